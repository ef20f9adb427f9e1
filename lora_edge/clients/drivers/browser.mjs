/** A page of headless Chromium with a server of its own: what drivers that run bundles in a page share. */
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const PAGE = "<!doctype html><meta charset=utf-8><title>lora-edge</title>";
const PLACES = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const QUIET = [
  "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync", "--disable-background-networking",
];

/** Answers with an empty page, and with the files of some folders; the server's address. */
async function serve(served) {
  const server = createServer((request, response) => {
    const [, root, ...rest] = decodeURIComponent(request.url.split("?")[0]).split("/");
    if (!root) {
      response.setHeader("content-type", "text/html");
      response.end(PAGE);
      return;
    }
    const file = path.join(served.get(root) ?? "/nowhere", ...rest);
    if (rest.includes("..") || !existsSync(file) || !statSync(file).isFile()) {
      response.statusCode = 404;
      response.end();
      return;
    }
    response.setHeader("content-type", TYPES[path.extname(file)] ?? "application/octet-stream");
    response.setHeader("content-length", statSync(file).size);
    createReadStream(file).pipe(response);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  return `http://127.0.0.1:${server.address().port}`;
}

/**
 * @param {string} folder has playwright-core; LORA_EDGE_CHROMIUM names another browser
 * @param {string} scripts file of the package in JavaScript
 * @param {Record<string, string>} folders name -> folder that the page can read, beside `drivers`
 *   and `package`
 * @param {string[]} args of Chromium
 * @param {string[]} without what playwright gives to Chromium otherwise
 */
export async function browse(folder, scripts, folders, args = [], without = []) {
  const executablePath = process.env.LORA_EDGE_CHROMIUM ?? PLACES.find((each) => existsSync(each));
  if (!executablePath) throw new Error("there is no Chromium; LORA_EDGE_CHROMIUM names one");
  const require = createRequire(pathToFileURL(`${folder}/package.json`));
  const { chromium } = require("playwright-core");
  const own = { drivers: path.dirname(fileURLToPath(import.meta.url)), package: path.dirname(scripts) };
  const address = await serve(new Map(Object.entries({ ...own, ...folders })));
  const browser = await chromium.launch({
    executablePath,
    args: [...QUIET, ...args],
    ignoreDefaultArgs: without,
  });
  process.on("exit", () => browser.close());
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  return {
    about: `Chromium ${browser.version()}`,
    address,
    /** In a fresh page: `begin(address, ...given)` sets `does`, the page's orders. */
    async load(begin, ...given) {
      await page.goto(address);
      return page.evaluate(begin, [address, ...given]);
    },
    /** The answer of an order in the page; numbers come back as text. */
    async ask(order, given) {
      const { arrays, ...told } = await page.evaluate(
        async ([name, what]) => {
          const { arrays: found, ...rest } = await globalThis.does[name](what);
          const texts = found?.map(({ data, dims }) => {
            const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
            let text = "";
            for (let i = 0; i < bytes.length; i += 32768) {
              text += String.fromCharCode(...bytes.subarray(i, i + 32768));
            }
            return { dims: Array.from(dims), text: btoa(text) };
          });
          return { ...rest, arrays: texts };
        },
        [order, given],
      );
      if (!arrays) return told;
      const numbers = arrays.map(({ dims, text }) => ({ dims, data: Buffer.from(text, "base64") }));
      return { ...told, arrays: numbers };
    },
  };
}
