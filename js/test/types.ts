/** The types hold what a program needs: `tsc --strict` compiles this; it is not run. */
import { type Adapter, type Bundle, open } from "../index.js";

declare const ort: { Tensor: new (type: any, data: any) => any };

export async function main(): Promise<number> {
  const bundle: Bundle = await open("bundle", { ort, session: false });
  const adapter: Adapter = ["echo", null, { echo: 0.5, mirror: 0.5 }];
  const decoding = await bundle.start(3, { adapter });
  const [logits] = await decoding.extend([[1, 2], [3], [4]]);
  for await (const token of bundle.generate([1, 2], { adapter: "echo", temperature: 0.7 })) {
    await decoding.step([token, null, token]);
  }
  // @ts-expect-error  a weight is a number
  await bundle.feeds({ echo: "1" });
  return logits.length + bundle.adapters.length;
}
