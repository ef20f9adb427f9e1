/** node node.mjs PACKAGE FOLDER: bundles in onnxruntime-node, which FOLDER has. */
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { orders } from "./bundle.mjs";
import { talk } from "./talk.mjs";

const [, , scripts, folder] = process.argv;
const require = createRequire(pathToFileURL(`${folder}/package.json`));
const { open } = await import(pathToFileURL(scripts));
const ort = require("onnxruntime-node");
const { version } = require("onnxruntime-node/package.json");
let Tokenizer;
try {
  ({ Tokenizer } = require("@huggingface/tokenizers"));
} catch (error) {
  if (error.code !== "MODULE_NOT_FOUND") throw error;
}
// Like the drivers of Python: threads that wait awake take the time of others.
const session = { intraOpNumThreads: 1, interOpNumThreads: 1 };
await talk(orders(open, { ort, Tokenizer, session }, () => `onnxruntime-node ${version}`));
