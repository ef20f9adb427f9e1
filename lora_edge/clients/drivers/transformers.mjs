/** Orders -> transformers.js: its own model classes, cache and tokenizer; in Node and in a page. One row. */

const CLASSES = {
  "text-generation": "AutoModelForCausalLM",
  "text-classification": "AutoModelForSequenceClassification",
  "token-classification": "AutoModelForTokenClassification",
};

/**
 * @param {object} library transformers.js
 * @param {(place: string, options: object) => Promise<object>} open of the package lora-edge, which
 *   reads the adapters' files: they are further inputs of `model(...)`
 * @param {(place: string) => [string, string]} named a bundle's place -> `localModelPath` and name
 * @param {object} options of `from_pretrained`: where it runs
 * @param {string} about what runs there
 */
export function orders(library, open, named, options, about) {
  const { Tensor, env } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  let bundle;
  let model;
  let tokenizer;
  const sequences = new Map();
  const integers = (values) =>
    new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const numbers = (tensor) => ({ data: Float32Array.from(tensor.data), dims: tensor.dims.slice(1) });
  const fed = (states) => (bundle.manifest.mode === "merged" ? {} : bundle.feeds(states));
  return {
    async open({ bundle: place, graph }) {
      bundle = await open(place, { ort: { Tensor }, session: false, graph });
      const [root, name] = named(place);
      env.localModelPath = root;
      const kind = library[CLASSES[bundle.manifest.task] ?? "AutoModel"];
      const file = graph.split("/").at(-1).replace(/\.onnx$/, "");
      model = await kind.from_pretrained(name, { ...options, dtype: "fp32", model_file_name: file });
      const can = ["blend"];
      if (bundle.manifest.files["tokenizer.json"]) {
        tokenizer = await library.AutoTokenizer.from_pretrained(name);
        can.push("encode", "nul");
      }
      return { about, can };
    },
    async start({ states, sequence }) {
      sequences.set(sequence, { feeds: await fed(states), past: null, length: 0 });
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
      const outputs = await model({ ...Object.fromEntries(given), ...(await fed(states)) });
      return { arrays: [numbers(outputs[bundle.part.output])] };
    },
    async encode({ text, adapter }) {
      const own = adapter && bundle.manifest.adapters[adapter].text.includes("tokenizer");
      if (own) throw new Error("transformers.js has one tokenizer for all adapters");
      return { ids: tokenizer.encode(text) };
    },
  };
}
