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
let graph;

async function open(given) {
  graph = given.graph;
  const folders = { ort: path.join(runtime, "dist"), tokenizers, bundle: given.bundle };
  // WebGPU in software is switched off with the GPU.
  page = await browse(folder, scripts, folders, webgpu ? gpu : [], webgpu ? ["--disable-gpu"] : []);
  const told = await load();
  const where = `${page.about}, ${webgpu ? "WebGPU" : "WebAssembly"}`;
  return { ...told, about: `onnxruntime-web ${version} in ${where}` };
}

/** A fresh page with the bundle open. */
const load = () =>
  page.load(
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

/** WebGPU in software loses its buffers after some hundred runs: each case has a fresh page. */
const start = async (given) => {
  if (webgpu && given.sequence === 0) await load();
  return page.ask("start", given);
};
const rest = ["extend", "outputs", "encode"].map((order) => [order, (given) => page.ask(order, given)]);
await talk({ open, start, ...Object.fromEntries(rest) });
