/** The page: two texts and an adapter, and how alike the texts' embeddings are. */
import { adapter, ask, begin, find, onSubmit, say } from "./page.js";

onSubmit(async () => {
  const places = [find("#one"), find("#two")];
  const empty = places.find((place) => !place.value.trim());
  if (empty) {
    empty.focus();
    throw new Error("Write two texts first.");
  }
  say("Comparing …");
  const began = performance.now();
  const texts = places.map((place) => place.value);
  const { cosine, size } = await ask("embed", { texts, adapter: adapter() });
  find("#similarity").textContent = cosine.toFixed(3);
  find("#bar").value = cosine;
  find("#bar").style.setProperty("--share", `${50 * (1 + cosine)}%`);
  find("#bar").hidden = false;
  const took = Math.round(performance.now() - began);
  say(`The cosine of two embeddings of ${size} numbers, in ${took} ms.`);
});
begin();
