/** node main.mjs "A text" [--adapter NAME]: its labels and their scores, best first. */
import { begin, fail } from "./adapter.mjs";

const USAGE = 'node main.mjs "A text" [--adapter NAME]';

try {
  const { bundle, words, adapter } = await begin(USAGE, 1, 1);
  const [labels] = await bundle.classify(words, { adapter });
  for (const { label, score } of labels) console.log(`${label}\t${score.toFixed(4)}`);
} catch (error) {
  fail(error);
}
