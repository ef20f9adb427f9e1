/**
 * How texts become embeddings, as sentence-transformers' files of a bundle say. What cannot be done
 * as they say is refused by name.
 */
import { BundleError } from "./errors.js";

const FLAGS = {
  pooling_mode_cls_token: "cls",
  pooling_mode_mean_tokens: "mean",
  pooling_mode_lasttoken: "lasttoken",
};
const KINDS = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"];
const join = (folder, file) => (folder ? `${folder}/${file}` : file);

/**
 * What a bundle's files say; without `modules.json` the mean of the hidden states.
 * @param {object} bundle its `json(path)` and `manifest`
 * @param {string[]} adapters names of the adapters in use
 * @returns {Promise<{ mode: string, normalize: boolean, prompt: string, longest: number }>}
 */
export async function poolingOf(bundle, adapters = []) {
  for (const name of adapters) {
    if (bundle.manifest.files[`adapters/${name}/sentence_transformers/modules.json`]) {
      throw new BundleError(`'${name}' makes embeddings in a way of its own, which is not done here`);
    }
  }
  const modules = await bundle.json("modules.json");
  const plain = { mode: "mean", normalize: false, prompt: "", longest: Infinity };
  const transformer = modules?.find((x) => x.type.endsWith("Transformer"))?.path ?? "";
  let longest = plain.longest;
  for (const kind of KINDS) {
    const file = join(transformer, `sentence_${kind}_config.json`);
    const settings = await bundle.json(file);
    if (!settings) continue;
    if (settings.do_lower_case) {
      throw new BundleError(`${file}: texts are lowered before they are read, which is not done here`);
    }
    longest = settings.max_seq_length ?? longest;
    break;
  }
  if (!modules) return { ...plain, longest };
  const kinds = modules.map((module) => module.type.split(".").at(-1));
  const odd = kinds.find((kind) => !["Transformer", "Pooling", "Normalize"].includes(kind));
  if (odd) throw new BundleError(`modules.json: the module '${odd}' is not known here`);
  const file = join(modules[kinds.indexOf("Pooling")]?.path ?? "", "config.json");
  const config = (await bundle.json(file)) ?? {};
  const flags = Object.keys(config).filter((key) => key.startsWith("pooling_mode_") && config[key]);
  const modes = config.pooling_mode ? [config.pooling_mode].flat() : flags.map((key) => FLAGS[key]);
  if (modes.length !== 1 || !Object.values(FLAGS).includes(modes[0])) {
    throw new BundleError(`${file}: this pooling is not known here`);
  }
  const { prompts = {}, default_prompt_name: chosen } =
    (await bundle.json("config_sentence_transformers.json")) ?? {};
  const prompt = chosen ? (prompts[chosen] ?? "") : "";
  if (prompt && config.include_prompt === false) {
    throw new BundleError(`${file}: the prompt's tokens are left out, which is not done here`);
  }
  return { mode: modes[0], normalize: kinds.includes("Normalize"), prompt, longest };
}

/**
 * @param {Float32Array} hidden `[tokens * size]` of one text
 * @param {number} size
 */
export function pooled(hidden, size, { mode, normalize }) {
  const tokens = hidden.length / size;
  const found = new Float32Array(size);
  if (mode === "mean") {
    for (let i = 0; i < size; i++) {
      let sum = 0;
      for (let t = 0; t < tokens; t++) sum += hidden[t * size + i];
      found[i] = sum / tokens;
    }
  } else {
    const token = mode === "cls" ? 0 : tokens - 1;
    found.set(hidden.subarray(token * size, (token + 1) * size));
  }
  if (!normalize) return found;
  const length = Math.max(Math.hypot(...found), 1e-12);
  return found.map((x) => x / length);
}
