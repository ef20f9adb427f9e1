/** The page: a text and an adapter, and a bar for each label. */
import { adapter, ask, begin, find, onSubmit, say } from "./page.js";

function line({ label, score }) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const meter = document.createElement("meter");
  const share = document.createElement("span");
  name.textContent = label;
  meter.value = score;
  meter.style.setProperty("--share", `${100 * score}%`);
  share.textContent = `${(100 * score).toFixed(1)} %`;
  meter.setAttribute("aria-label", `${label}: ${share.textContent}`);
  item.append(name, meter, share);
  return item;
}

onSubmit(async () => {
  const text = find("#text").value;
  if (!text.trim()) {
    find("#text").focus();
    throw new Error("Write a text first.");
  }
  say("Classifying …");
  const began = performance.now();
  const labels = await ask("classify", { text, adapter: adapter() });
  find("#labels").replaceChildren(...labels.map(line));
  say(`Done in ${Math.round(performance.now() - began)} ms.`);
});
begin();
