/** Adapter files -> what the graph is fed: one adapter as it lies, others side by side. */
import { parseAdapter } from "./adapter_file.js";
import { BundleError } from "./errors.js";
import { toHalf } from "./half.js";
import { NONE } from "./states.js";

const SELECT = "lora.select";
const STACKED = ["G", "bias", "weight"];
const NEVER = Number.MAX_SAFE_INTEGER;

/** The position from which an adapter is active on a row: the last invocation of its prompt. */
function invokedAt(row, invocation) {
  if (!invocation.length) return 0;
  for (let start = row.length - invocation.length; start >= 0; start--) {
    if (invocation.every((token, i) => row[start + i] === token)) return start;
  }
  return NEVER;
}

/** Pairs of rank 0 become zeros of rank 1: WebGPU takes no dimension of size 0. */
function ranked(tensors) {
  for (const [name, { dims }] of tensors) {
    if (!name.endsWith(".A") || dims[1] !== 0) continue;
    const other = `${name.slice(0, -1)}B`;
    const [, columns] = tensors.get(other).dims;
    tensors.set(name, { dims: [dims[0], 1], data: new Float32Array(dims[0]) });
    tensors.set(other, { dims: [1, columns], data: new Float32Array(columns) });
  }
  return tensors;
}

/** Matrices `[rows, columns]` side by side. */
function beside(tensors) {
  const rows = tensors[0].dims[0];
  const width = tensors.reduce((sum, x) => sum + x.dims[1], 0);
  const data = new Float32Array(rows * width);
  let left = 0;
  for (const { dims, data: own } of tensors) {
    for (let i = 0; i < rows; i++) {
      data.set(own.subarray(i * dims[1], (i + 1) * dims[1]), i * width + left);
    }
    left += dims[1];
  }
  return { dims: [rows, width], data };
}

/** Tensors one under the other, along their first dimension. */
function under(tensors) {
  const [, ...rest] = tensors[0].dims;
  const data = new Float32Array(tensors.reduce((sum, x) => sum + x.data.length, 0));
  let top = 0;
  for (const { data: own } of tensors) {
    data.set(own, top);
    top += own.length;
  }
  return { dims: [tensors.reduce((sum, x) => sum + x.dims[0], 0), ...rest], data };
}

/** Task heads of rows, `[1, height, labels]` each; fewer labels are padded with zeros. */
function padded(tensors) {
  const labels = Math.max(...tensors.map((x) => x.dims[2]));
  const height = tensors[0].dims[1];
  const data = new Float32Array(tensors.length * height * labels);
  tensors.forEach(({ dims, data: own }, row) => {
    for (let i = 0; i < height; i++) {
      const line = own.subarray(i * dims[2], (i + 1) * dims[2]);
      data.set(line, (row * height + i) * labels);
    }
  });
  return { dims: [tensors.length, height, labels], data };
}

export class Adapters {
  /**
   * @param {object} bundle its `manifest`, `part` and `verified(path)`
   * @param {object} ort onnxruntime-node or onnxruntime-web
   */
  constructor(bundle, ort) {
    this.bundle = bundle;
    this.ort = ort;
    this.half = bundle.half;
    this.files = new Map();
    this.alone = new Map();
  }

  /** The tensors of an adapter's file, verified and read once. */
  async tensors(name) {
    if (!this.files.has(name)) {
      const { file } = this.bundle.manifest.adapters[name];
      const read = async () => ranked(parseAdapter(await this.bundle.verified(file), file));
      this.files.set(
        name,
        read().catch((error) => {
          this.files.delete(name);
          throw error;
        }),
      );
    }
    return this.files.get(name);
  }

  tensor({ dims, data }) {
    const Tensor = this.ort.Tensor;
    return this.half ? new Tensor("float16", toHalf(data), dims) : new Tensor("float32", data, dims);
  }

  /**
   * What a batch is fed.
   * @param {object[]} states of every row
   * @returns {Promise<{ fixed: object, gates: Function, labels: number[], byToken: boolean }>}
   */
  async binding(states) {
    if (this.bundle.manifest.mode === "merged") {
      return { fixed: {}, gates: () => ({}), labels: [], byToken: false };
    }
    const alike = new Set(states.map((state) => JSON.stringify(state))).size === 1;
    const names = [...new Set(states.flatMap(Object.keys))].sort();
    const entries = this.bundle.manifest.adapters;
    if (states.some((state) => !Object.keys(state).length)) await this.checkBase();
    const plain = alike && names.length < 2 && Object.values(states[0]).every((x) => x === 1);
    if (plain && !entries[names[0] ?? NONE].invocation.length) {
      return this.asItLies(names[0] ?? NONE, states.length);
    }
    const own = names.length ? names : [NONE];
    const read = new Map(
      await Promise.all([NONE, ...own].map(async (name) => [name, await this.tensors(name)])),
    );
    const rows = alike ? [states[0]] : states;
    const weights = rows.map((state) => own.map((name) => state[name] ?? 0));
    const { fixed, ranks, labels } = this.combined(own, rows, read);
    const invocations = own.map((name) => entries[name].invocation);
    const gates = this.gatesOf(weights, ranks, invocations, states.length);
    return {
      fixed,
      gates,
      labels: alike ? Array(states.length).fill(labels[0]) : labels,
      byToken: invocations.some((x) => x.length),
    };
  }

  /** The base has outputs of its own: a task head, where the graph takes one. */
  async checkBase() {
    const tensors = await this.tensors(NONE);
    for (const [path, site] of Object.entries(this.bundle.part.sites)) {
      if (site.parts.includes("W") && !tensors.has(`lora.${path}.W`)) {
        const names = this.bundle.adapters.join(", ");
        throw new BundleError(`the base has no task head ${path}; choose an adapter: ${names}`);
      }
    }
  }

  async asItLies(name, batch) {
    if (!this.alone.has(name)) {
      const tensors = await this.tensors(name);
      const made = [...tensors].map(([input, tensor]) => [input, this.tensor(tensor)]);
      this.alone.set(name, Object.fromEntries(made));
    }
    const fixed = this.alone.get(name);
    const head = Object.keys(fixed).find((input) => input.endsWith(".W"));
    return {
      fixed,
      gates: () => ({}),
      labels: head ? Array(batch).fill(fixed[head].dims[2]) : [],
      byToken: false,
    };
  }

  combined(names, rows, read) {
    const fixed = {};
    const ranks = new Map();
    let labels = [];
    for (const [path, site] of Object.entries(this.bundle.part.sites)) {
      const of = (part) => names.map((name) => read.get(name).get(`lora.${path}.${part}`));
      if (site.parts.includes("A")) {
        fixed[`lora.${path}.A`] = this.tensor(beside(of("A")));
        fixed[`lora.${path}.B`] = this.tensor(under(of("B")));
        ranks.set(
          path,
          of("A").map((x) => x.dims[1]),
        );
      }
      for (const part of STACKED.filter((x) => site.parts.includes(x))) {
        fixed[`lora.${path}.${part}`] = this.tensor(under(of(part)));
      }
      if (site.parts.includes("W")) {
        // A blend has the head of its first adapter that brings one.
        const heads = rows.map((state) => {
          const own = Object.keys(state);
          const adapters = this.bundle.manifest.adapters;
          return own.find((name) => adapters[name].labels.length) ?? own[0] ?? NONE;
        });
        for (const part of ["W", "c"]) {
          const input = `lora.${path}.${part}`;
          const tensors = heads.map((name) => read.get(name).get(input));
          labels = tensors.map((x) => x.dims[2]);
          fixed[input] = this.tensor(padded(tensors));
        }
      }
    }
    return { fixed, ranks, labels };
  }

  /** Gates and `lora.select`, where they differ by row, and by token where an aLoRA is among them. */
  gatesOf(weights, ranks, invocations, batch) {
    const selects = Object.values(this.bundle.part.sites).some((site) =>
      STACKED.some((part) => site.parts.includes(part)),
    );
    const byToken = invocations.some((x) => x.length);
    const layouts = new Map();
    for (const [path, own] of ranks) {
      const key = own.join();
      layouts.set(key, { own, paths: [...(layouts.get(key)?.paths ?? []), path] });
    }
    const filled = (active, width, own) => {
      const rank = own.reduce((a, b) => a + b, 0);
      const height = active.length;
      const data = new Float32Array(height * width * rank);
      let at = 0;
      for (const row of active) {
        for (let column = 0; column < width; column++) {
          own.forEach((count, index) => {
            data.fill(row(column, index), at, at + count);
            at += count;
          });
        }
      }
      return this.tensor({ dims: [height, width, rank], data });
    };
    const made = (active, width) => {
      const values = {};
      for (const { own, paths } of layouts.values()) {
        const gate = filled(active, width, own);
        for (const path of paths) values[`lora.${path}.gate`] = gate;
      }
      if (selects) values[SELECT] = filled(active, width, weights[0].map(() => 1));
      return values;
    };
    if (!byToken) {
      const same = made(
        weights.map((row) => (_, index) => row[index]),
        1,
      );
      return () => same;
    }
    let starts = null;
    return (prompts, positions) => {
      starts ??= prompts.map((row) => invocations.map((x) => invokedAt(row, x)));
      const active = Array.from({ length: batch }, (_, row) => (column, index) => {
        const weight = weights.length === 1 ? weights[0][index] : weights[row][index];
        return positions[row][column] >= starts[row][index] ? weight : 0;
      });
      return made(active, positions[0].length);
    };
  }
}
