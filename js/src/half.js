/** float32 -> the bits of float16, rounded to nearest, ties to even. */
import { BundleError } from "./errors.js";

const word = new Uint32Array(1);
const number = new Float32Array(word.buffer);

function bitsOf(value) {
  number[0] = value;
  const bits = word[0];
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) {
    throw new BundleError(`an adapter's tensor holds ${value}, float16 ends at 65504`);
  }
  if (magnitude < 0x38800000) {
    // Below 2^-14: a multiple of 2^-24. The products and sums of such numbers are exact here.
    const scaled = Math.abs(number[0]) * 2 ** 24;
    const floor = Math.floor(scaled);
    const rest = scaled - floor;
    return sign | (floor + (rest > 0.5 || (rest === 0.5 && floor % 2) ? 1 : 0));
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
  return sign | ((rounded - 0x38000000) >>> 13);
}

/** @param {Float32Array} values */
export function toHalf(values) {
  return Uint16Array.from(values, bitsOf);
}
