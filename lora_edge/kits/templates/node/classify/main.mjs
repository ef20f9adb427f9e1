/** node main.mjs "A text" [--adapter NAME]: its labels and their scores, best first. */
import { begin, fail } from "./adapter.mjs";

const USAGE = 'node main.mjs "A text" [--adapter NAME]';

/** Logits -> scores: each label by itself, or all of them together. */
function scores(logits, byItself) {
  if (byItself) return logits.map((x) => 1 / (1 + Math.exp(-x)));
  const top = Math.max(...logits);
  const shares = logits.map((x) => Math.exp(x - top));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((x) => x / total);
}

try {
  const { bundle, words, adapter } = await begin(USAGE, 1, 1);
  const state = bundle.states(adapter, 1)[0];
  const headed = Object.entries(bundle.part.sites).find(([, site]) => site.parts.includes("W"));
  if (headed && !Object.keys(state).length && !bundle.labelsOf(state, null).length) {
    throw new Error(`the base has no labels of its own. Give --adapter: ${bundle.adapters.join(", ")}`);
  }
  const ids = await bundle.encode(words[0], { adapter });
  const longest = bundle.part.max_length || Infinity;
  if (ids.length > longest) {
    throw new Error(`the text has ${ids.length} tokens, and the model reads ${longest}`);
  }
  const [found] = await bundle.outputs([{ input_ids: ids }], { adapter });
  const names = bundle.labelsOf(state, adapter);
  const config = (await bundle.json("config.json")) ?? {};
  scores(Array.from(found.data), config.problem_type === "multi_label_classification")
    .map((score, index) => [names[index] ?? `label ${index}`, score])
    .sort(([, a], [, b]) => b - a)
    .forEach(([label, score]) => console.log(`${label}\t${score.toFixed(4)}`));
} catch (error) {
  fail(error);
}
