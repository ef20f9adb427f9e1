/** Generates text; the page stays free meanwhile. */
import { breathe, serve } from "./serve.js";

serve({
  async generate(bundle, { prompt, adapter, most }, { tell, signal }) {
    const ids = await bundle.encode(prompt, { adapter });
    const longest = bundle.part.max_length || Infinity;
    const room = longest - ids.length;
    if (room < 1) {
      throw new Error(`The prompt has ${ids.length} tokens, and the model reads ${longest}.`);
    }
    const maxNewTokens = Math.min(most, room);
    const found = [];
    let first = 0;
    for await (const token of bundle.generate(ids, { adapter, maxNewTokens })) {
      found.push(token);
      // The prompt is read before the first token: the speed is that of the others.
      const now = performance.now();
      if (found.length === 1) first = now;
      const speed = found.length > 1 ? (1000 * (found.length - 1)) / (now - first) : 0;
      tell({ text: await bundle.decode(found, { adapter }), count: found.length, speed });
      await breathe();
      if (signal.aborted) return { ended: "Stopped." };
    }
    if (found.length < maxNewTokens) return { ended: "The model ended." };
    return { ended: maxNewTokens < most ? "The model reads no more tokens." : "That is all you asked for." };
  },
});
