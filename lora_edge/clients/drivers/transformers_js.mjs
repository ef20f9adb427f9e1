/**
 * node transformers_js.mjs PACKAGE FOLDER: bundles in transformers.js, which FOLDER has: its own
 * model classes, cache and tokenizer; adapters are further inputs of `model(...)`. One row.
 */
import { readFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { talk } from "./talk.mjs";

const [, , scripts, folder] = process.argv;
const home = path.join(folder, "node_modules", "@huggingface", "transformers");
const found = await import(pathToFileURL(path.join(home, "dist", "transformers.node.mjs")));
const { version } = JSON.parse(readFileSync(path.join(home, "package.json"), "utf8"));
const { open } = await import(pathToFileURL(scripts));
const { Tensor } = found;
found.env.allowRemoteModels = false;
found.env.allowLocalModels = true;
const CLASSES = {
  "text-generation": "AutoModelForCausalLM",
  "text-classification": "AutoModelForSequenceClassification",
  "token-classification": "AutoModelForTokenClassification",
};

let bundle;
let model;
let tokenizer;
const sequences = new Map();

const integers = (values) =>
  new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const numbers = (tensor) => ({ data: Float32Array.from(tensor.data), dims: tensor.dims.slice(1) });

await talk({
  async open({ bundle: place, graph }) {
    bundle = await open(place, { ort: { Tensor }, session: false, graph });
    found.env.localModelPath = path.dirname(place);
    const kind = found[CLASSES[bundle.manifest.task] ?? "AutoModel"];
    model = await kind.from_pretrained(path.basename(place), {
      device: "cpu",
      dtype: "fp32",
      model_file_name: path.basename(graph, ".onnx"),
      session_options: { intraOpNumThreads: 1 },
    });
    const can = ["blend"];
    if (bundle.manifest.files["tokenizer.json"]) {
      tokenizer = await found.AutoTokenizer.from_pretrained(path.basename(place));
      can.push("encode", "nul");
    }
    return { about: `transformers.js ${version}, onnxruntime-node in it`, can };
  },
  async start({ states, sequence }) {
    const feeds = bundle.manifest.mode === "merged" ? {} : await bundle.feeds(states);
    sequences.set(sequence, { feeds, past: null, length: 0 });
    return {};
  },
  async extend({ rows, every, sequence }) {
    const decoding = sequences.get(sequence);
    const [row] = rows;
    decoding.length += row.length;
    const outputs = await model({
      ...decoding.feeds,
      input_ids: integers(row),
      attention_mask: integers(Array(decoding.length).fill(1)),
      past_key_values: decoding.past,
    });
    const present = Object.entries(outputs).filter(([name]) => name.startsWith("present"));
    decoding.past = Object.fromEntries(
      present.map(([name, value]) => [name.replace("present", "past_key_values"), value]),
    );
    const { data, dims } = numbers(outputs.logits);
    const size = dims.at(-1);
    const kept = every ? data : data.slice(data.length - size);
    return { arrays: [{ data: kept, dims: [kept.length / size, size] }] };
  },
  async outputs({ rows, states }) {
    const [row] = rows;
    const given = Object.entries(row).map(([name, values]) =>
      name === "pixel_values"
        ? [name, new Tensor("float32", Float32Array.from(values.flat(3)), [1, ...bundle.part.sample])]
        : [name, integers(values)],
    );
    const feeds = bundle.manifest.mode === "merged" ? {} : await bundle.feeds(states);
    const outputs = await model({ ...Object.fromEntries(given), ...feeds });
    return { arrays: [numbers(outputs[bundle.part.output])] };
  },
  async encode({ text, adapter }) {
    const own = adapter && bundle.manifest.adapters[adapter].text.includes("tokenizer");
    if (own) throw new Error("transformers.js has one tokenizer for all adapters");
    return { ids: tokenizer.encode(text) };
  },
});
