/** node transformers_js.mjs PACKAGE FOLDER: bundles in transformers.js in Node; FOLDER has it. */
import { readFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { talk } from "./talk.mjs";
import { orders } from "./transformers.mjs";

const [, , scripts, folder] = process.argv;
const home = path.join(folder, "node_modules", "@huggingface", "transformers");
const library = await import(pathToFileURL(path.join(home, "dist", "transformers.node.mjs")));
const { version } = JSON.parse(readFileSync(path.join(home, "package.json"), "utf8"));
const { open } = await import(pathToFileURL(scripts));
const options = { device: "cpu", session_options: { intraOpNumThreads: 1 } };
const named = (place) => [path.dirname(place), path.basename(place)];
const about = `transformers.js ${version}, onnxruntime-node in it`;
await talk(orders(library, open, named, options, about));
