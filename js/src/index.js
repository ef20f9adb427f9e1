export { open, Bundle } from "./bundle.js";
export { Decoding } from "./decoding.js";
export { parseAdapter } from "./adapter_file.js";
export { BundleError } from "./errors.js";
