/** What the command line says, and the bundle beside this file. */
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

process.env.ORT_DISABLE_TELEMETRY ??= "1";

/** Ends the program with a message in words. */
export function fail(error) {
  console.error(`error: ${error?.message ?? error}`);
  process.exit(2);
}

async function load(name) {
  try {
    return await import(name);
  } catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new Error(`${name} is not installed. Run: npm install --ignore-scripts`);
  }
}

/** `["a"]` -> "a"; `["a=0.5", "b=0.5"]` -> weights by name; nothing -> null. */
function adapterOf(choices) {
  if (!choices.length) return null;
  if (choices.length === 1 && !choices[0].includes("=")) return choices[0];
  return Object.fromEntries(
    choices.map((choice) => {
      const [name, weight = "1"] = choice.split("=");
      return [name, weight.trim() ? Number(weight) : NaN];
    }),
  );
}

/**
 * @param {string} usage what is told to who gives too few or too many words
 * @param {number} least so many words are needed
 * @param {number} most so many are taken
 * @param {object} more further options of `parseArgs`
 */
export async function begin(usage, least, most, more = {}) {
  const options = { adapter: { type: "string", multiple: true, default: [] }, ...more };
  const { values, positionals: words } = parseArgs({ options, allowPositionals: true });
  if (words.length < least || words.length > most) throw new Error(`usage: ${usage}`);
  const ort = await load("onnxruntime-node");
  const { Tokenizer } = await load("@huggingface/tokenizers");
  const { open } = await import("./lora-edge/index.js");
  const place = fileURLToPath(new URL("./bundle", import.meta.url));
  const bundle = await open(place, { ort: ort.default ?? ort, Tokenizer });
  return { bundle, words, values, adapter: adapterOf(values.adapter) };
}
