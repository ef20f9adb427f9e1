/**
 * `.onnx_adapter` files: a FlatBuffer of named tensors (adapter_schema.fbs of ONNX Runtime).
 * The format has no checksum; whoever opens a file compares its hash first.
 */
import { BundleError } from "./errors.js";

const ARRAYS = new Map([
  [1, ["float32", Float32Array]],
  [10, ["float16", Uint16Array]],
]);
const FORMAT_VERSION = 1;

/**
 * The tensors of a file: name -> { type, dims, data }.
 * @param {Uint8Array} bytes
 * @param {string} source names the file in errors
 */
export function parseAdapter(bytes, source = "the adapter file") {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = new TextDecoder("utf-8", { fatal: true });
  const field = (table, index) => {
    const vtable = table - view.getInt32(table, true);
    const at = 4 + 2 * index;
    return at < view.getUint16(vtable, true) ? view.getUint16(vtable + at, true) : 0;
  };
  const follow = (at) => at + view.getUint32(at, true);
  const vector = (table, index, size) => {
    const offset = field(table, index);
    if (!offset) return { start: 0, count: 0 };
    const at = follow(table + offset);
    const count = view.getUint32(at, true);
    if (at + 4 + count * size > bytes.length) throw new RangeError("it ends too early");
    return { start: at + 4, count };
  };
  const integer = (table, index) => {
    const offset = field(table, index);
    return offset ? view.getInt32(table + offset, true) : 0;
  };
  const tensor = (table) => {
    const name = vector(table, 0, 1);
    const shape = vector(table, 1, 8);
    const content = vector(table, 3, 1);
    const named = text.decode(bytes.subarray(name.start, name.start + name.count));
    const kind = ARRAYS.get(integer(table, 2));
    if (!kind) throw new RangeError(`${named} is of type ${integer(table, 2)}`);
    const dims = Array.from({ length: shape.count }, (_, i) =>
      Number(view.getBigInt64(shape.start + 8 * i, true)),
    );
    const [type, Array_] = kind;
    const wanted = dims.reduce((a, b) => a * b, Array_.BYTES_PER_ELEMENT);
    if (Math.min(0, ...dims) < 0 || wanted !== content.count) {
      throw new RangeError(`${named} is [${dims}] of ${content.count} bytes`);
    }
    const copy = bytes.slice(content.start, content.start + content.count);
    return [named, { type, dims, data: new Array_(copy.buffer) }];
  };
  if (bytes.length < 8 || String.fromCharCode(...bytes.subarray(4, 8)) !== "TORT") {
    throw new BundleError(`${source} is not an .onnx_adapter file`);
  }
  try {
    const root = follow(0);
    if (integer(root, 0) !== FORMAT_VERSION) {
      throw new RangeError(`its format is of version ${integer(root, 0)}`);
    }
    const list = vector(root, 3, 4);
    const found = Array.from({ length: list.count }, (_, i) => tensor(follow(list.start + 4 * i)));
    const tensors = new Map(found);
    if (tensors.size !== found.length) throw new RangeError("a name is there twice");
    return tensors;
  } catch (error) {
    if (error instanceof BundleError) throw error;
    throw new BundleError(`${source} is damaged: ${error.message}`);
  }
}
