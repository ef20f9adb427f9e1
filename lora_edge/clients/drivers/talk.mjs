/** The driver's side of the talk: one JSON line for each order, numbers in a file. */
import { writeFile } from "node:fs/promises";
import { createInterface } from "node:readline";

/**
 * @param {object} does order -> async function of it; what it returns is the answer. `arrays`
 *   of an answer, `[{ data, dims }]`, go into the order's file.
 */
export async function talk(does) {
  // Only answers go to stdout.
  console.log = console.info = console.debug = console.error;
  for await (const line of createInterface({ input: process.stdin })) {
    let answer;
    try {
      const { do: order, ...given } = JSON.parse(line);
      const { arrays, ...told } = await does[order](given);
      answer = told;
      if (arrays) {
        const parts = arrays.map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
        await writeFile(given.file, Buffer.concat(parts));
        answer.shapes = arrays.map(({ dims }) => Array.from(dims));
      }
    } catch (error) {
      answer = { error: String(error.message ?? error).split("\n")[0], hint: "" };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
  process.exit(0);
}
