/** Labels a text; the page stays free meanwhile. */
import { serve } from "./serve.js";

/** Logits -> scores: each label by itself, or all of them together. */
function scores(logits, byItself) {
  if (byItself) return logits.map((x) => 1 / (1 + Math.exp(-x)));
  const top = Math.max(...logits);
  const shares = logits.map((x) => Math.exp(x - top));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((x) => x / total);
}

serve({
  async classify(bundle, { text, adapter }) {
    const ids = await bundle.encode(text, { adapter });
    const longest = bundle.part.max_length || Infinity;
    if (ids.length > longest) {
      throw new Error(`The text has ${ids.length} tokens, and the model reads ${longest}.`);
    }
    const [found] = await bundle.outputs([{ input_ids: ids }], { adapter });
    const names = bundle.labelsOf(bundle.states(adapter, 1)[0], adapter);
    const config = (await bundle.json("config.json")) ?? {};
    const each = scores(Array.from(found.data), config.problem_type === "multi_label_classification");
    return each
      .map((score, index) => ({ label: names[index] ?? `label ${index}`, score }))
      .sort((a, b) => b.score - a.score);
  },
});
