/** node main.mjs "A text" ["Another text"] [--adapter NAME[=WEIGHT]]...: how alike two texts are.
 * Of one text, its embedding. */
import { begin, fail } from "./adapter.mjs";

const USAGE = 'node main.mjs "A text" ["Another text"] [--adapter NAME[=WEIGHT]]...';

try {
  const { bundle, words, adapter } = await begin(USAGE, 1, 2);
  const longest = bundle.part.max_length || Infinity;
  for (const text of words) {
    const { length } = await bundle.encode(text, { adapter });
    if (length > longest) throw new Error(`a text has ${length} tokens, and the model reads ${longest}`);
  }
  const [one, two] = await bundle.embed(words, { adapter });
  if (!two) {
    console.log(JSON.stringify(Array.from(one)));
  } else {
    const dot = one.reduce((sum, x, index) => sum + x * two[index], 0);
    console.log((dot / (Math.hypot(...one) * Math.hypot(...two) || 1)).toFixed(4));
  }
} catch (error) {
  fail(error);
}
