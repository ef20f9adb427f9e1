/** A batch of sequences in a decoder: token ids in, logits out, keys and values in between. */
import { BundleError } from "./errors.js";

/** Where each row's new tokens stand in one run; a fused graph pads on the right. */
function chunkOf(rows, history, width, first) {
  const ids = rows.map(() => Array(width).fill(0));
  const positions = rows.map(() => Array(width).fill(0));
  rows.forEach((row, index) => {
    row.forEach((token, i) => {
      ids[index][first[index] + i] = token;
    });
    const last = history[index].length + row.length - 1;
    for (let i = 0; i < width; i++) {
      const place = history[index].length + i - first[index];
      positions[index][i] = Math.max(0, Math.min(place, last));
    }
  });
  return { ids, positions };
}

export class Decoding {
  /** Made by `Bundle.start`. */
  constructor(bundle, binding, batch) {
    this.bundle = bundle;
    this.binding = binding;
    this.batch = batch;
    /** The token ids of each row that are in the cache. */
    this.history = Array.from({ length: batch }, () => []);
    this.past = null;
    this.mask = Array.from({ length: batch }, () => []);
    this.prompts = null;
  }

  /**
   * Append tokens to every row; an empty row rests.
   * @param {number[][]} rows
   * @param {{ every?: boolean }} [options] `every`: the logits after each new token, not the last
   * @returns {Promise<Float32Array[]>} of each row `[tokens * vocabulary]`
   */
  async extend(rows, { every = false } = {}) {
    this.check(rows);
    this.prompts ??= rows.map((row) => [...row]);
    const { part } = this.bundle;
    const width = Math.max(...rows.map((row) => row.length));
    const unequal = this.batch > 1 && rows.some((row) => row.length !== width);
    const later = this.history.some((row) => row.length) && this.batch > 1 && width > 1;
    // A fused graph takes several new tokens behind a past for one row only.
    if (part.form === "fused" && later) return this.oneByOne(rows, width, every);
    if (part.form === "foreign" && (unequal || rows.some((row) => !row.length))) {
      throw new BundleError(
        "this graph was made by another exporter, and takes rows of equal length only",
      );
    }
    return this.run(rows, every);
  }

  /** Append one token to each row; a row whose token is null rests. */
  async step(tokens) {
    return this.extend(tokens.map((token) => (token === null ? [] : [token])));
  }

  check(rows) {
    const { part } = this.bundle;
    if (rows.length !== this.batch) {
      throw new BundleError(`${rows.length} rows were given, the batch has ${this.batch}`);
    }
    rows.forEach((row, index) => {
      if (!row.length && !this.history[index].length) {
        throw new BundleError(`row ${index} has no tokens, expected at least 1`);
      }
      const odd = row.find((id) => !Number.isInteger(id) || id < 0 || id >= part.vocab_size);
      if (odd !== undefined) {
        throw new BundleError(`token id ${odd} is outside the vocabulary of ${part.vocab_size}`);
      }
      const length = this.history[index].length + row.length;
      if (part.max_length && length > part.max_length) {
        throw new BundleError(`row ${index} would have ${length} tokens of ${part.max_length}`);
      }
    });
    if (rows.every((row) => !row.length)) throw new BundleError("all rows rest");
  }

  async oneByOne(rows, width, every) {
    const found = rows.map(() => []);
    for (let column = 0; column < width; column++) {
      const step = await this.run(
        rows.map((row) => row.slice(column, column + 1)),
        false,
      );
      step.forEach((logits, index) => {
        if (column < rows[index].length) found[index].push(logits);
      });
    }
    return found.map((steps) => {
      const kept = every ? steps : steps.slice(-1);
      const size = this.bundle.part.vocab_size;
      const whole = new Float32Array(kept.length * size);
      kept.forEach((logits, i) => whole.set(logits, i * size));
      return whole;
    });
  }

  layout(rows) {
    const { part } = this.bundle;
    if (part.form === "fused") {
      // A resting row writes its last token into its own place again: same token, same values.
      const fed = rows.map((row, i) => (row.length ? row : this.history[i].slice(-1)));
      const before = this.history.map((old, i) => (rows[i].length ? old : old.slice(0, -1)));
      const width = Math.max(...fed.map((row) => row.length));
      const totals = fed.map((row, i) => before[i].length + row.length);
      const total = Math.max(...totals);
      const mask = totals.map((n) => Array.from({ length: total }, (_, i) => Number(i < n)));
      const first = fed.map(() => 0);
      return { ...chunkOf(fed, before, width, first), mask, first, width };
    }
    const left = part.padding === "left" || (part.padding === "either" && part.form !== "portable");
    const width = Math.max(...rows.map((row) => row.length));
    const first = rows.map((row) => (left && row.length ? width - row.length : 0));
    const fresh = rows.map((row, index) =>
      Array.from({ length: width }, (_, i) =>
        Number(i >= first[index] && i < first[index] + row.length),
      ),
    );
    const mask = this.mask.map((old, index) => [...old, ...fresh[index]]);
    return { ...chunkOf(rows, this.history, width, first), mask, first, width };
  }

  async run(rows, every) {
    const { bundle } = this;
    const { ort, part, session } = bundle;
    const { ids, positions, mask, first, width } = this.layout(rows);
    const all = every || this.binding.byToken;
    const integers = (values) => {
      const flat = BigInt64Array.from(values.flat(), BigInt);
      return new ort.Tensor("int64", flat, [values.length, values[0].length]);
    };
    const feeds = {
      ...this.binding.fixed,
      ...this.binding.gates(this.prompts, positions),
      ...(this.past ?? bundle.emptyCache(this.batch)),
      input_ids: integers(ids),
      attention_mask: integers(mask),
    };
    if (part.inputs.includes("position_ids")) feeds.position_ids = integers(positions);
    const keeps = part.inputs.includes("num_logits_to_keep");
    if (keeps) {
      feeds.num_logits_to_keep = new ort.Tensor("int64", [all ? 0n : 1n], []);
    }
    const found = await session.run(feeds);
    this.past = bundle.pastOf(found);
    this.mask = mask;
    rows.forEach((row, index) => this.history[index].push(...row));
    const logits = await bundle.numbers(found.logits);
    const size = part.vocab_size;
    const columns = keeps && !all ? 1 : width;
    return rows.map((row, index) => {
      const begin = columns === 1 ? 0 : first[index];
      const end = columns === 1 ? 1 : begin + Math.max(row.length, 1);
      const from = every ? begin : end - 1;
      return logits.slice((index * columns + from) * size, (index * columns + end) * size);
    });
  }
}
