/** Compares texts; the page stays free meanwhile. */
import { serve } from "./serve.js";

serve({
  async embed(bundle, { texts, adapter }) {
    const longest = bundle.part.max_length || Infinity;
    for (const text of texts) {
      const { length } = await bundle.encode(text, { adapter });
      if (length > longest) {
        throw new Error(`A text has ${length} tokens, and the model reads ${longest}.`);
      }
    }
    const [one, two] = await bundle.embed(texts, { adapter });
    const dot = one.reduce((sum, x, index) => sum + x * two[index], 0);
    const cosine = dot / (Math.hypot(...one) * Math.hypot(...two) || 1);
    return { cosine, size: one.length };
  },
});
