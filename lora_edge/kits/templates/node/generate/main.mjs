/** node main.mjs "A prompt" [--adapter NAME[=WEIGHT]]... [--max-new-tokens 64]: text, as it comes. */
import { begin, fail } from "./adapter.mjs";

const USAGE = 'node main.mjs "A prompt" [--adapter NAME[=WEIGHT]]... [--max-new-tokens 64]';

try {
  const more = { "max-new-tokens": { type: "string", default: "64" } };
  const { bundle, words, values, adapter } = await begin(USAGE, 1, 1, more);
  const most = Number(values["max-new-tokens"]);
  if (!Number.isInteger(most) || most < 1) throw new Error("--max-new-tokens takes a whole number from 1 on");
  const ids = await bundle.encode(words[0], { adapter });
  const longest = bundle.part.max_length || Infinity;
  if (ids.length > longest) {
    throw new Error(`the prompt has ${ids.length} tokens, and the model reads ${longest}`);
  }
  const maxNewTokens = Math.min(most, longest - ids.length + 1);
  const found = [];
  let shown = "";
  for await (const token of bundle.generate(ids, { adapter, maxNewTokens })) {
    found.push(token);
    const text = await bundle.decode(found, { adapter });
    // A letter may be made of several tokens: until it is whole, it ends in this sign.
    if (text.startsWith(shown) && !text.endsWith("\ufffd")) {
      process.stdout.write(text.slice(shown.length));
      shown = text;
    }
  }
  const whole = await bundle.decode(found, { adapter });
  process.stdout.write(`${whole.startsWith(shown) ? whole.slice(shown.length) : ""}\n`);
} catch (error) {
  fail(error);
}
