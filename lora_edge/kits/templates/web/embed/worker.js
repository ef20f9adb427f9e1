/** Compares texts; the page stays free meanwhile. */
import { serve } from "./serve.js";

serve({
  async embed(bundle, { texts, adapter }) {
    const [one, two] = await bundle.embed(texts, { adapter });
    const dot = one.reduce((sum, x, index) => sum + x * two[index], 0);
    const cosine = dot / (Math.hypot(...one) * Math.hypot(...two) || 1);
    return { cosine, size: one.length };
  },
});
