/** Hidden states of a text's tokens -> its embedding, as sentence-transformers' files say. */
import { BundleError } from "./errors.js";

const FLAGS = {
  pooling_mode_cls_token: "cls",
  pooling_mode_mean_tokens: "mean",
  pooling_mode_lasttoken: "lasttoken",
};

/** What a bundle's `modules.json` says; without one the mean of the hidden states. */
export async function poolingOf(bundle) {
  const modules = await bundle.json("modules.json");
  if (!modules) return { mode: "mean", normalize: false };
  const kinds = modules.map((module) => module.type.split(".").at(-1));
  const odd = kinds.find((kind) => !["Transformer", "Pooling", "Normalize"].includes(kind));
  if (odd) throw new BundleError(`modules.json: the module '${odd}' is not known here`);
  const folder = modules[kinds.indexOf("Pooling")]?.path ?? "";
  const config = (await bundle.json(`${folder}/config.json`)) ?? {};
  const flags = Object.keys(config).filter((key) => key.startsWith("pooling_mode_") && config[key]);
  const modes = config.pooling_mode ? [config.pooling_mode].flat() : flags.map((key) => FLAGS[key]);
  if (modes.length !== 1 || !Object.values(FLAGS).includes(modes[0])) {
    throw new BundleError(`${folder}/config.json: this pooling is not known here`);
  }
  return { mode: modes[0], normalize: kinds.includes("Normalize") };
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
