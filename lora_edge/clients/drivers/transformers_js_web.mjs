/**
 * node transformers_js_web.mjs PACKAGE FOLDER: bundles in transformers.js, in a page of headless
 * Chromium on WebAssembly. FOLDER has @huggingface/transformers and playwright-core.
 */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { browse } from "./browser.mjs";
import { talk } from "./talk.mjs";

const [, , scripts, folder] = process.argv;
const home = path.join(folder, "node_modules", "@huggingface", "transformers");
const { version } = JSON.parse(readFileSync(path.join(home, "package.json"), "utf8"));
// The WebAssembly of the release that transformers.js has in it.
const beside = createRequire(pathToFileURL(path.join(home, "package.json")));
const ort = path.dirname(beside.resolve("onnxruntime-web"));
let page;

async function open({ bundle, graph }) {
  page = await browse(folder, scripts, { transformers: path.join(home, "dist"), ort, bundle });
  const told = await page.load(async ([at, graphFile]) => {
    const library = await import(`${at}/transformers/transformers.js`);
    const { wasm, versions } = library.env.backends.onnx;
    // The one that transformers.js takes by itself, .asyncify, lacks operators of few bits.
    const file = `${at}/ort/ort-wasm-simd-threaded`;
    wasm.wasmPaths = { mjs: `${file}.mjs`, wasm: `${file}.wasm` };
    wasm.numThreads = 1;
    library.env.useBrowserCache = false;
    library.env.useWasmCache = false;
    const { open: openBundle } = await import(`${at}/package/index.js`);
    const { orders } = await import(`${at}/drivers/transformers.mjs`);
    const named = () => ["/", "bundle"];
    // config.json tells of the data of model.onnx; the graph in floats lies on the same.
    const externalData = [{ path: "model.onnx_data", data: "onnx/model.onnx_data" }];
    const other = { use_external_data_format: false, session_options: { externalData } };
    const options = { device: "wasm", ...(graphFile.endsWith("/model.onnx") ? {} : other) };
    globalThis.does = orders(library, openBundle, named, options, versions.web);
    return globalThis.does.open({ bundle: `${at}/bundle`, graph: graphFile });
  }, graph);
  const runs = `onnxruntime-web ${told.about} (ort-wasm-simd-threaded) in ${page.about}`;
  return { ...told, about: `transformers.js ${version}, ${runs}` };
}

const rest = ["start", "extend", "outputs", "encode"].map((order) => [
  order,
  (given) => page.ask(order, given),
]);
await talk({ open, ...Object.fromEntries(rest) });
