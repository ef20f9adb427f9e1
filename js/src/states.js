/** What is asked for -> what is active on each row: `{}` no adapter, `{ name: weight, … }`. */
import { BundleError } from "./errors.js";

/** The adapter in every switchable bundle that changes nothing. */
export const NONE = "none";

function stateOf(choice, manifest) {
  if (choice === null || choice === undefined) return {};
  const asked = typeof choice === "string" ? { [choice]: 1 } : choice;
  if (typeof asked !== "object" || Array.isArray(asked)) {
    throw new BundleError(`adapter is ${choice}, expected a name, null or { name: weight }`);
  }
  for (const [name, weight] of Object.entries(asked)) {
    if (!Object.hasOwn(manifest.adapters, name)) {
      const known = Object.keys(manifest.adapters).sort().join(", ");
      throw new BundleError(`there is no adapter '${name}'; the bundle has ${known}`);
    }
    if (typeof weight !== "number" || !Number.isFinite(weight)) {
      throw new BundleError(`the weight of '${name}' is ${weight}, expected a finite number`);
    }
  }
  if (manifest.mode === "merged") {
    if (Object.keys(asked).length && Object.values(asked).join() !== "1") {
      throw new BundleError("a merged bundle runs its one adapter at weight 1");
    }
    return {};
  }
  const parts = Object.entries(asked).filter(([name, weight]) => name !== NONE && weight !== 0);
  for (const [name, weight] of parts) {
    const reason = manifest.adapters[name].alone;
    if (reason && (parts.length > 1 || weight !== 1)) {
      throw new BundleError(`'${name}' cannot be blended or weighted: ${reason}`);
    }
  }
  return Object.fromEntries(parts.sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** The state of every row: of one choice for all, or of a list with one for each. */
export function statesOf(adapter, batch, manifest) {
  const choices = Array.isArray(adapter) ? adapter : Array(batch).fill(adapter);
  if (choices.length !== batch) {
    throw new BundleError(`${choices.length} adapters were given for ${batch} rows`);
  }
  return choices.map((choice) => stateOf(choice, manifest));
}
