/** A bundle of lora-edge on onnxruntime-node or onnxruntime-web. */
import { Adapters } from "./adapters.js";
import { Decoding } from "./decoding.js";
import { BundleError } from "./errors.js";
import { pooled, poolingOf } from "./pooling.js";
import { best, sampled, scores } from "./sampling.js";
import { sha256, sourceOf } from "./source.js";
import { NONE, statesOf } from "./states.js";

const MANIFEST = "lora_edge.json";
const FORMAT_VERSION = 2;

export class Bundle {
  /** Made by `open`. */
  constructor(source, ort, manifest, options) {
    this.source = source;
    this.ort = ort;
    this.manifest = manifest;
    this.options = options;
    /** The one graph that is run. */
    this.part = Object.values(manifest.parts)[0];
    this.graph = options.graph ?? this.part.file;
    /** Whether the graph computes in float16. */
    this.half = manifest.precision === "fp16" && this.graph !== this.part.exact;
    this.bindings = new Adapters(this, ort);
    this.tokenizers = new Map();
    this.session = null;
  }

  /** Names of the adapters, without `none`. */
  get adapters() {
    return Object.keys(this.manifest.adapters)
      .filter((name) => name !== NONE)
      .sort();
  }

  /** The bytes of one of the bundle's files, which must be those of the manifest. */
  async verified(path) {
    const entry = this.manifest.files[path];
    if (!entry) throw new BundleError(`${path} is not in ${MANIFEST}`);
    const bytes = await this.source.read(path);
    if (this.options.verify === false) return bytes;
    if (bytes.length !== entry.bytes || (await sha256(bytes)) !== entry.sha256) {
      throw new BundleError(`${path} differs from its hash in ${MANIFEST}`);
    }
    return bytes;
  }

  /** A JSON file of the bundle; null where it has none. */
  async json(path) {
    if (!this.manifest.files[path]) return null;
    return JSON.parse(new TextDecoder().decode(await this.verified(path)));
  }

  async connect() {
    const { graph } = this;
    const bytes = await this.verified(graph);
    const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
    const settings = { ...this.options.session };
    if (this.source.remote) {
      const files = Object.keys(this.manifest.files);
      const data = files.filter((path) => path.startsWith(folder) && path.endsWith("_data"));
      settings.externalData = await Promise.all(
        data.map(async (path) => ({
          path: path.slice(folder.length),
          data: await this.verified(path),
        })),
      );
      this.session = await this.ort.InferenceSession.create(bytes, settings);
    } else {
      this.session = await this.ort.InferenceSession.create(this.source.at(graph), settings);
    }
  }

  emptyCache(batch) {
    const { cache } = this.part;
    if (!cache) throw new BundleError("this model has no cache; use outputs()");
    const { half } = this;
    const empty = half ? new Uint16Array(0) : new Float32Array(0);
    const dims = [batch, cache.kv_heads, 0, cache.head_dim];
    const past = new this.ort.Tensor(half ? "float16" : "float32", empty, dims);
    const names = Array.from({ length: cache.layers }, (_, i) => `past_key_values.${i}`);
    return Object.fromEntries(names.flatMap((x) => [`${x}.key`, `${x}.value`].map((y) => [y, past])));
  }

  pastOf(found) {
    const present = Object.entries(found).filter(([name]) => name.startsWith("present."));
    return Object.fromEntries(
      present.map(([name, value]) => [name.replace("present", "past_key_values"), value]),
    );
  }

  async numbers(tensor) {
    return tensor.location && tensor.location !== "cpu" ? tensor.getData() : tensor.data;
  }

  /** A new batch of sequences with an empty cache. */
  async start(batch, { adapter = null } = {}) {
    if (!this.part.cache) throw new BundleError("this bundle does not generate text");
    return new Decoding(this, await this.bindings.binding(this.states(adapter, batch)), batch);
  }

  states(adapter, batch) {
    return statesOf(adapter, batch, this.manifest);
  }

  /**
   * The adapter inputs of a batch, for whoever runs the graph by other means.
   * @returns {Promise<object>} graph input -> tensor
   */
  async feeds(adapter = null, batch = 1) {
    const binding = await this.bindings.binding(this.states(adapter, batch));
    if (binding.byToken) throw new BundleError("an aLoRA's inputs depend on the tokens");
    return { ...binding.fixed, ...binding.gates() };
  }

  /** New token ids behind a prompt, one by one; ends at the model's end tokens. */
  async *generate(prompt, options = {}) {
    const { adapter = null, maxNewTokens = 64, temperature = 0, signal } = options;
    const ids = typeof prompt === "string" ? await this.encode(prompt, { adapter }) : prompt;
    const decoding = await this.start(1, { adapter });
    const ends = new Set(options.ends ?? (await this.endTokens(adapter)));
    const random = options.random ?? Math.random;
    let [logits] = await decoding.extend([ids]);
    for (let count = 0; count < maxNewTokens; count++) {
      signal?.throwIfAborted();
      const token = temperature > 0 ? sampled(logits, options, random) : best(logits);
      if (ends.has(token)) return;
      yield token;
      if (count + 1 < maxNewTokens) [logits] = await decoding.step([token]);
    }
  }

  /** A whole answer as text. */
  async answer(prompt, options = {}) {
    const ids = [];
    for await (const token of this.generate(prompt, options)) ids.push(token);
    return this.decode(ids, options);
  }

  /** The tokens that end a text: the model's, and that of a tokenizer that an adapter brings. */
  async endTokens(adapter = null) {
    // The first that is there counts alone, as in transformers.
    const told = (await this.json("generation_config.json")) ?? (await this.json("config.json"));
    const merged = this.manifest.mode === "merged";
    const names = merged ? Object.keys(this.manifest.adapters) : Object.keys(this.states(adapter, 1)[0]);
    const own = names.filter((name) => this.manifest.adapters[name].text?.includes("tokenizer"));
    const folders = own.map((name) => (merged ? "" : `adapters/${name}/text/`));
    const ends = await Promise.all(folders.map((folder) => this.endOf(folder)));
    return [told?.eos_token_id ?? [], ...ends].flat();
  }

  /** The end token of a tokenizer, in a list. */
  async endOf(folder) {
    const config = (await this.json(`${folder}tokenizer_config.json`)) ?? {};
    const older = config.added_tokens_decoder ? null : await this.json(`${folder}special_tokens_map.json`);
    const { eos_token: end } = { ...config, ...older };
    const text = end?.content ?? end;
    const { added_tokens: added = [], model } = await this.json(`${folder}tokenizer.json`);
    const known = added.find(({ content }) => content === text)?.id;
    if (known !== undefined) return [known];
    // A unigram's vocabulary is a list of texts and scores.
    const place = Array.isArray(model.vocab)
      ? model.vocab.findIndex(([piece]) => piece === text)
      : (model.vocab[text] ?? -1);
    return place < 0 ? [] : [place];
  }

  /**
   * Outputs of a model without a cache: labels of each row, or hidden states of its tokens.
   * @param {object[]} rows of each its inputs by name, e.g. `{ input_ids: [1, 2] }`
   * @returns {Promise<{ data: Float32Array, dims: number[] }[]>} without padding
   */
  async outputs(rows, { adapter = null } = {}) {
    const { ort, part } = this;
    if (part.cache || part.output === undefined) throw new BundleError("use start()");
    const binding = await this.bindings.binding(this.states(adapter, rows.length));
    const feeds = { ...binding.fixed, ...binding.gates([], rows.map(() => [0])) };
    const lengths = rows.map((row) => row.input_ids?.length ?? 0);
    const width = Math.max(...lengths);
    if (part.max_length && width > part.max_length) {
      throw new BundleError(`a row has ${width} tokens, the model has ${part.max_length} positions`);
    }
    const ids = rows.flatMap((row) => Array.from(row.input_ids ?? []));
    const odd = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= part.vocab_size);
    if (odd !== undefined) {
      throw new BundleError(`token id ${odd} is outside the vocabulary of ${part.vocab_size}`);
    }
    for (const name of part.inputs) {
      if (name === "pixel_values") {
        const size = part.sample.reduce((a, b) => a * b, 1);
        const pixels = new Float32Array(rows.length * size);
        rows.forEach((row, index) => pixels.set(row.pixel_values, index * size));
        feeds[name] = new ort.Tensor("float32", pixels, [rows.length, ...part.sample]);
        continue;
      }
      const fill = name === "input_ids" ? part.pad_token_id : 0;
      const given = (row) =>
        row[name] ?? row.input_ids.map(() => Number(name === "attention_mask"));
      const flat = rows.flatMap((row) => {
        const own = given(row);
        return [...own, ...Array(width - own.length).fill(fill)];
      });
      feeds[name] = new ort.Tensor("int64", BigInt64Array.from(flat, BigInt), [rows.length, width]);
    }
    const found = (await this.session.run(feeds))[part.output];
    const numbers = await this.numbers(found);
    const size = found.dims.at(-1);
    const each = numbers.length / rows.length;
    return rows.map((row, index) => {
      const whole = numbers.slice(index * each, (index + 1) * each);
      if (found.dims.length === 3) {
        const count = lengths[index] || found.dims[1];
        return { data: whole.slice(0, count * size), dims: [count, size] };
      }
      const labels = binding.labels[index] ?? size;
      return { data: whole.slice(0, labels), dims: [labels] };
    });
  }

  /** Labels of each text with their scores, best first. */
  async classify(texts, { adapter = null } = {}) {
    const found = await this.outputs(await this.rowsOf(texts, adapter), { adapter });
    const config = (await this.json("config.json")) ?? {};
    const byItself = config.problem_type === "multi_label_classification";
    const states = this.states(adapter, texts.length);
    return found.map(({ data, dims }, index) => {
      if (dims.length !== 1) throw new BundleError("this bundle labels tokens, not texts: outputs()");
      const names = this.labelsOf(states[index], adapter);
      return scores(data, byItself)
        .map((score, i) => ({ label: names[i] ?? `LABEL_${i}`, score }))
        .sort((one, other) => other.score - one.score);
    });
  }

  labelsOf(state, adapter) {
    const own = Object.keys(state);
    const asked = own.length ? own : [typeof adapter === "string" ? adapter : NONE];
    const found = asked.map((name) => this.manifest.adapters[name]?.labels ?? []);
    return found.find((labels) => labels.length) ?? [];
  }

  /** The embedding of each text. */
  async embed(texts, { adapter = null } = {}) {
    const states = this.states(adapter, texts.length);
    const merged = this.manifest.mode === "merged" ? this.adapters : [];
    const pooling = await poolingOf(this, [...merged, ...states.flatMap(Object.keys)]);
    const rows = await this.rowsOf(
      texts.map((text) => pooling.prompt + text),
      adapter,
    );
    const odd = rows.find((row) => row.input_ids.length > pooling.longest);
    if (odd) {
      const count = odd.input_ids.length;
      throw new BundleError(`a text has ${count} tokens, the model reads ${pooling.longest}: shorten it`);
    }
    const found = await this.outputs(rows, { adapter });
    return found.map(({ data, dims }) => pooled(data, dims[1], pooling));
  }

  async rowsOf(texts, adapter) {
    const each = Array.isArray(adapter) ? adapter : texts.map(() => adapter);
    return Promise.all(
      texts.map(async (text, i) => ({ input_ids: await this.encode(text, { adapter: each[i] }) })),
    );
  }

  /** The tokenizer of the base, or the one that an adapter brings. */
  async tokenizerOf(adapter = null) {
    const { Tokenizer } = this.options;
    if (!Tokenizer) {
      throw new BundleError("texts need open(place, { ort, Tokenizer }), of @huggingface/tokenizers");
    }
    const entry = typeof adapter === "string" ? this.manifest.adapters[adapter] : null;
    const folder = entry?.text?.includes("tokenizer") ? `adapters/${adapter}/text/` : "";
    if (!this.tokenizers.has(folder)) {
      const own = await this.json(`${folder}tokenizer.json`);
      if (!own) throw new BundleError("the bundle has no tokenizer.json; give token ids");
      const config = (await this.json(`${folder}tokenizer_config.json`)) ?? {};
      this.tokenizers.set(folder, new Tokenizer(own, config));
    }
    return this.tokenizers.get(folder);
  }

  /** The token ids of a text. */
  async encode(text, { adapter = null } = {}) {
    return Array.from((await this.tokenizerOf(adapter)).encode(text).ids, Number);
  }

  /** The text of token ids, without special tokens. */
  async decode(ids, { adapter = null } = {}) {
    return (await this.tokenizerOf(adapter)).decode(ids, { skip_special_tokens: true });
  }
}

/**
 * Open a bundle.
 * @param {string | URL} place its folder (Node), or the address of its folder
 * @param {{ ort: object, Tokenizer?: Function, graph?: string, verify?: boolean, session?: object }} options
 */
export async function open(place, options) {
  if (!options?.ort?.Tensor) {
    throw new BundleError("ort is missing: open(place, { ort }), of onnxruntime-node or -web");
  }
  const source = sourceOf(place);
  const manifest = JSON.parse(new TextDecoder().decode(await source.read(MANIFEST)));
  if (manifest.format_version !== FORMAT_VERSION) {
    const found = manifest.format_version;
    throw new BundleError(`${MANIFEST} has format_version ${found}, expected ${FORMAT_VERSION}`);
  }
  if (Object.keys(manifest.parts).length !== 1) {
    throw new BundleError("encoder-decoders are not run here; lora-edge's own Runner runs them");
  }
  const bundle = new Bundle(source, options.ort, manifest, options);
  if (options.session !== false) await bundle.connect();
  return bundle;
}
