/** What is refused: a file, an argument, or a bundle that this module cannot run. */
export class BundleError extends Error {
  constructor(message) {
    super(message);
    this.name = "BundleError";
  }
}
