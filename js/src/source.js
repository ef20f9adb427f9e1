/** Where a bundle's files are: a folder in Node, an address elsewhere. */
import { BundleError } from "./errors.js";

const inNode = typeof process !== "undefined" && Boolean(process.versions?.node);

/**
 * @param {string | URL} place a folder's path, or an address that its files are below
 * @returns {{ remote: boolean, at(path: string): string, read(path: string): Promise<Uint8Array> }}
 */
export function sourceOf(place) {
  const text = String(place).replace(/\/+$/, "");
  if (!inNode || /^https?:/.test(text)) {
    const at = (path) => `${text}/${path}`;
    const read = async (path) => {
      const answer = await fetch(at(path));
      if (!answer.ok) throw new BundleError(`${at(path)} cannot be read: HTTP ${answer.status}`);
      return new Uint8Array(await answer.arrayBuffer());
    };
    return { remote: true, at, read };
  }
  const at = (path) => `${text.replace(/^file:\/\//, "")}/${path}`;
  const read = async (path) => {
    const { readFile } = await import("node:fs/promises");
    try {
      return new Uint8Array(await readFile(at(path)));
    } catch (error) {
      throw new BundleError(`${at(path)} cannot be read: ${error.code ?? error.message}`);
    }
  };
  return { remote: false, at, read };
}

/** The SHA-256 of bytes, in hexadecimal digits. */
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new BundleError("hashes need a secure context: https, or localhost");
  }
  const digest = await globalThis.crypto.subtle.digest("SHA-256", bytes);
  return Array.from(new Uint8Array(digest), (x) => x.toString(16).padStart(2, "0")).join("");
}
