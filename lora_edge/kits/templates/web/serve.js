/** The worker's side: opens the bundle, then does what the page asks for. */
import { open } from "./lora-edge/index.js";

/** Imports a package of node_modules; workers have no import map, so the page says where it is. */
async function load(name, address) {
  try {
    return await import(address);
  } catch {
    throw new Error(`${name} could not be loaded. Run npm install, then reload this page.`);
  }
}

async function opened({ modules, place }) {
  const ort = await load("onnxruntime-web", modules.ort);
  const { Tokenizer } = await load("@huggingface/tokenizers", modules.tokenizers);
  ort.env.wasm.wasmPaths = new URL("./", modules.ort).href;
  ort.env.logLevel = "error";
  return open(place, { ort, Tokenizer, session: { executionProviders: ["wasm"] } });
}

/** Lets a message come in, such as the one that says to stop. */
export function breathe() {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      done();
    };
    port2.postMessage(null);
  });
}

/**
 * @param {object} orders name -> async function (bundle, given, { tell, signal }); what it returns
 *   goes to the page, and so does each part that it tells on the way
 */
export function serve(orders) {
  let bundle = null;
  let stopping = null;
  self.onmessage = async ({ data: { id, order, given } }) => {
    if (order === "stop") {
      stopping?.abort();
      return;
    }
    try {
      if (order === "open") {
        bundle = await opened(given);
        self.postMessage({ id, done: null });
        return;
      }
      stopping = new AbortController();
      const tell = (part) => self.postMessage({ id, part });
      const done = await orders[order](bundle, given, { tell, signal: stopping.signal });
      self.postMessage({ id, done });
    } catch (error) {
      self.postMessage({ id, error: String(error?.message ?? error) });
    }
  };
}
