/**
 * node web.mjs PACKAGE FOLDER [--webgpu]: bundles in a page of headless Chromium, on onnxruntime-web.
 * FOLDER has onnxruntime-web and playwright-core. LORA_EDGE_CHROMIUM names another browser.
 */
import { createReadStream, existsSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { talk } from "./talk.mjs";

const [, , scripts, folder, ...options] = process.argv;
const webgpu = options.includes("--webgpu");
const require = createRequire(pathToFileURL(`${folder}/package.json`));
const { chromium } = require("playwright-core");
const modules = path.join(folder, "node_modules");
const runtime = path.join(modules, "onnxruntime-web");
const { version } = JSON.parse(readFileSync(path.join(runtime, "package.json"), "utf8"));
const tokenizers = path.join(modules, "@huggingface", "tokenizers", "dist");
const served = new Map([
  ["drivers", path.dirname(fileURLToPath(import.meta.url))],
  ["package", path.dirname(scripts)],
  ["ort", path.join(runtime, "dist")],
  ["tokenizers", tokenizers],
]);
const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const PAGE = "<!doctype html><meta charset=utf-8><title>lora-edge</title>";

const server = createServer((request, response) => {
  const [, root, ...rest] = decodeURIComponent(request.url.split("?")[0]).split("/");
  if (!root) {
    response.setHeader("content-type", "text/html");
    response.end(PAGE);
    return;
  }
  const file = path.join(served.get(root) ?? "/nowhere", ...rest);
  if (rest.includes("..") || !existsSync(file) || !statSync(file).isFile()) {
    response.statusCode = 404;
    response.end();
    return;
  }
  response.setHeader("content-type", TYPES[path.extname(file)] ?? "application/octet-stream");
  response.setHeader("content-length", statSync(file).size);
  createReadStream(file).pipe(response);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const address = `http://127.0.0.1:${server.address().port}`;

const places = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const executablePath = process.env.LORA_EDGE_CHROMIUM ?? places.find((each) => existsSync(each));
const quiet = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"];
const gpu = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
let page;
let opened;

async function open(given) {
  if (!executablePath) throw new Error("there is no Chromium; LORA_EDGE_CHROMIUM names one");
  const browser = await chromium.launch({
    executablePath,
    args: [...quiet, "--disable-background-networking", ...(webgpu ? gpu : [])],
    // WebGPU in software is switched off with the GPU.
    ignoreDefaultArgs: webgpu ? ["--disable-gpu"] : [],
  });
  process.on("exit", () => browser.close());
  served.set("bundle", given.bundle);
  opened = given;
  page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  const told = await load();
  const where = `Chromium ${browser.version()}, ${webgpu ? "WebGPU" : "WebAssembly"}`;
  return { ...told, about: `onnxruntime-web ${version} in ${where}` };
}

/** A fresh page with the bundle open. */
async function load() {
  await page.goto(address);
  return page.evaluate(
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
    [address, opened.graph, existsSync(tokenizers), webgpu],
  );
}

/** An order in the page; numbers come back as text. */
const inPage = (order) => async (given) => {
  const { arrays, ...told } = await page.evaluate(
    async ([name, what]) => {
      const { arrays: found, ...rest } = await globalThis.does[name](what);
      const texts = found?.map(({ data, dims }) => {
        const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
        let text = "";
        for (let i = 0; i < bytes.length; i += 32768) {
          text += String.fromCharCode(...bytes.subarray(i, i + 32768));
        }
        return { dims: Array.from(dims), text: btoa(text) };
      });
      return { ...rest, arrays: texts };
    },
    [order, given],
  );
  if (!arrays) return told;
  const numbers = arrays.map(({ dims, text }) => ({ dims, data: Buffer.from(text, "base64") }));
  return { ...told, arrays: numbers };
};

/** WebGPU in software loses its buffers after some hundred runs: each case has a fresh page. */
const start = async (given) => {
  if (webgpu && given.sequence === 0) await load();
  return inPage("start")(given);
};
const rest = ["extend", "outputs", "encode"].map((order) => [order, inPage(order)]);
await talk({ open, start, ...Object.fromEntries(rest) });
