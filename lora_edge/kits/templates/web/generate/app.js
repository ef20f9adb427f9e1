/** The page: a prompt and an adapter, and the answer as it comes. */
import { adapter, ask, begin, find, onSubmit, say, stop } from "./page.js";

const answer = find("#answer");

onSubmit(async () => {
  const prompt = find("#prompt").value;
  if (!prompt.trim()) {
    find("#prompt").focus();
    throw new Error("Write a prompt first.");
  }
  const given = { prompt, adapter: adapter(), most: Number(find("#most").value) };
  answer.textContent = "";
  answer.setAttribute("aria-busy", "true");
  find("#stop").disabled = false;
  say("Reading the prompt …");
  try {
    const told = ({ text, count, speed }) => {
      answer.textContent = text;
      say(`${count} tokens${speed ? `, ${speed.toFixed(1)} tokens/s` : ""}`);
    };
    const { ended } = await ask("generate", given, told);
    say(`${find("#status").textContent.replace("Reading the prompt …", "0 tokens")}. ${ended}`);
  } finally {
    answer.removeAttribute("aria-busy");
    find("#stop").disabled = true;
  }
});
find("#stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
begin();
