/** Logits -> the next token, or the scores of labels. */

export function best(logits) {
  let index = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[index]) index = i;
  return index;
}

/** @param {Float32Array} logits  @param {() => number} random of [0, 1) */
export function sampled(logits, { temperature, topK = 0, topP = 1 }, random) {
  let order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  if (topK) order = order.slice(0, topK);
  const top = logits[order[0]];
  const shares = order.map((index) => Math.exp((logits[index] - top) / temperature));
  const total = shares.reduce((a, b) => a + b, 0);
  // The fewest whose share is topP or more.
  let count = 0;
  for (let sum = 0; count < shares.length && sum < topP * total; count++) sum += shares[count];
  const kept = shares.slice(0, Math.max(count, 1));
  let left = random() * kept.reduce((a, b) => a + b, 0);
  const chosen = kept.findIndex((share) => (left -= share) < 0);
  return order[chosen < 0 ? kept.length - 1 : chosen];
}

/** Scores of labels: each by itself, or all of them together. */
export function scores(logits, byItself) {
  const each = Array.from(logits);
  if (byItself) return each.map((x) => 1 / (1 + Math.exp(-x)));
  const top = Math.max(...each);
  const shares = each.map((x) => Math.exp(x - top));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((x) => x / total);
}
