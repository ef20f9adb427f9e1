/** What every page of this kind has: the model in its worker, the adapter, messages. */
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let last = 0;

export const find = (selector) => document.querySelector(selector);

worker.onmessage = ({ data: { id, part, done, error } }) => {
  const { onPart, resolve, reject } = waiting.get(id);
  if (part !== undefined) {
    onPart(part);
    return;
  }
  waiting.delete(id);
  if (error === undefined) resolve(done);
  else reject(new Error(error));
};
worker.onerror = (event) => {
  event.preventDefault();
  const error = new Error(`The model's worker ended: ${event.message || "a file is missing"}.`);
  for (const { reject } of waiting.values()) reject(error);
  waiting.clear();
};

/** Asks the worker; `onPart` is called with each part of an answer that comes in parts. */
export function ask(order, given = {}, onPart = () => {}) {
  const id = ++last;
  return new Promise((resolve, reject) => {
    waiting.set(id, { onPart, resolve, reject });
    worker.postMessage({ id, order, given });
  });
}

/** Ends the answer that is being made. */
export function stop() {
  worker.postMessage({ order: "stop" });
}

export function say(text) {
  find("#status").textContent = text;
}

/** Shows what went wrong; without a text, nothing did. */
export function complain(text = "") {
  const place = find("#error");
  place.textContent = text;
  place.hidden = !text;
}

/** The chosen adapter: null, a name, or a weight for each of two names. */
export function adapter() {
  const chosen = find("input[name=adapter]:checked");
  if (!chosen || chosen.dataset.kind === "none") return null;
  if (chosen.dataset.kind === "one") return chosen.value;
  const share = Number(find("#share").value) / 100;
  const [first, second] = [find("#first").value, find("#second").value];
  if (first === second) throw new Error("Choose two different adapters for a blend.");
  return { [first]: 1 - share, [second]: share };
}

function showBlend() {
  const share = Number(find("#share").value);
  const text = `${find("#first").value} ${100 - share} %, ${find("#second").value} ${share} %`;
  find("#shares").textContent = text;
  find("#share").setAttribute("aria-valuetext", text);
}

if (find("#blend")) {
  const shown = () => {
    find("#blend").hidden = find("input[name=adapter]:checked").dataset.kind !== "blend";
  };
  find("#adapters").addEventListener("change", shown);
  find("#blend").addEventListener("input", showBlend);
  showBlend();
  shown();
}

/** Runs `work` when the form is sent: one at a time, with its errors shown. */
export function onSubmit(work) {
  const form = find("form");
  const button = find("#go");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    complain();
    button.disabled = true;
    form.setAttribute("aria-busy", "true");
    try {
      await work();
    } catch (error) {
      say("");
      complain(error.message);
    }
    form.removeAttribute("aria-busy");
    button.disabled = false;
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

/** Opens the bundle, and only then lets the form be sent. */
export async function begin() {
  try {
    await ask("open", {
      modules: {
        ort: import.meta.resolve("onnxruntime-web"),
        tokenizers: import.meta.resolve("@huggingface/tokenizers"),
      },
      place: new URL("./bundle", document.baseURI).href,
    });
    say("Ready.");
    find("#go").disabled = false;
  } catch (error) {
    say("");
    complain(error.message);
  }
}
