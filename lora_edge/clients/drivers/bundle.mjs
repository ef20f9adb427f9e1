/** Orders -> the package lora-edge in JavaScript; the same in Node and in a page. */

/**
 * @param {(place: string, options: object) => Promise<object>} open of the package
 * @param {object} options `ort`, and `Tokenizer` where there is one
 */
export function orders(open, options, about) {
  let bundle = null;
  const sequences = new Map();
  return {
    async open({ bundle: place, graph }) {
      bundle = await open(place, { ...options, graph });
      const can = ["batch", "mixed", "blend", "rests", ...(options.Tokenizer ? ["encode", "nul"] : [])];
      return { about: about(bundle), can };
    },
    async start({ states, sequence }) {
      sequences.set(sequence, await bundle.start(states.length, { adapter: states }));
      return {};
    },
    async extend({ rows, every, sequence }) {
      const size = bundle.part.vocab_size;
      const found = await sequences.get(sequence).extend(rows, { every });
      return { arrays: found.map((data) => ({ data, dims: [data.length / size, size] })) };
    },
    async outputs({ rows, states }) {
      const given = rows.map((row) =>
        row.pixel_values ? { pixel_values: Float32Array.from(row.pixel_values.flat(Infinity)) } : row,
      );
      return { arrays: await bundle.outputs(given, { adapter: states }) };
    },
    async encode({ text, adapter }) {
      return { ids: await bundle.encode(text, { adapter }) };
    },
  };
}
