/**
 * node web.mjs PACKAGE FOLDER [--webgpu]: bundles in a page of headless Chromium, on onnxruntime-web.
 * FOLDER has onnxruntime-web and playwright-core. LORA_EDGE_CHROMIUM names another browser.
 */
import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { browse } from "./browser.mjs";
import { talk } from "./talk.mjs";

const [, , scripts, folder, ...options] = process.argv;
const webgpu = options.includes("--webgpu");
const modules = path.join(folder, "node_modules");
const runtime = path.join(modules, "onnxruntime-web");
const { version } = JSON.parse(readFileSync(path.join(runtime, "package.json"), "utf8"));
const tokenizers = path.join(modules, "@huggingface", "tokenizers", "dist");
const gpu = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
let page;

async function open({ bundle, graph }) {
  const folders = { ort: path.join(runtime, "dist"), tokenizers, bundle };
  // WebGPU in software is switched off with the GPU.
  page = await browse(folder, scripts, folders, webgpu ? gpu : [], webgpu ? ["--disable-gpu"] : []);
  const told = await page.load(
    async ([at, graphFile, hasTokenizer, onGpu]) => {
      const ort = await import(`${at}/ort/${onGpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
      ort.env.wasm.wasmPaths = `${at}/ort/`;
      ort.env.wasm.numThreads = 1;
      ort.env.logLevel = "error";
      const { open: openBundle } = await import(`${at}/package/index.js`);
      const { orders } = await import(`${at}/drivers/bundle.mjs`);
      const Tokenizer = hasTokenizer
        ? (await import(`${at}/tokenizers/tokenizers.mjs`)).Tokenizer
        : undefined;
      const session = { executionProviders: [onGpu ? "webgpu" : "wasm"] };
      globalThis.does = orders(openBundle, { ort, Tokenizer, session }, () => "");
      return globalThis.does.open({ bundle: `${at}/bundle`, graph: graphFile });
    },
    graph,
    existsSync(tokenizers),
    webgpu,
  );
  const where = `${page.about}, ${webgpu ? "WebGPU" : "WebAssembly"}`;
  return { ...told, about: `onnxruntime-web ${version} in ${where}` };
}

const rest = ["start", "extend", "outputs", "encode"];
await talk({ open, ...Object.fromEntries(rest.map((order) => [order, (given) => page.ask(order, given)])) });
