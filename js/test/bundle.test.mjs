/** The package on onnxruntime-node; LORA_EDGE_BUNDLES has the bundles `text` and `labels`. */
import assert from "node:assert/strict";
import { cp, mkdtemp, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "node:test";

const require = createRequire(import.meta.url);
const ort = require("onnxruntime-node");
const { Tokenizer } = require("@huggingface/tokenizers");
const { BundleError, open, parseAdapter } = await import(
  path.join(process.env.LORA_EDGE_JS, "src", "index.js")
);
const { toHalf } = await import(path.join(process.env.LORA_EDGE_JS, "src", "half.js"));
const { pooled, poolingOf } = await import(path.join(process.env.LORA_EDGE_JS, "src", "pooling.js"));
const { sampled, scores } = await import(path.join(process.env.LORA_EDGE_JS, "src", "sampling.js"));

const text = path.join(process.env.LORA_EDGE_BUNDLES, "text");
const labels = path.join(process.env.LORA_EDGE_BUNDLES, "labels");
const bundle = await open(text, { ort, Tokenizer });
const PROMPT = "Word: river Answer:";

test("each adapter does what it was trained to", async () => {
  assert.deepEqual(bundle.adapters, ["echo", "mirror", "shout"]);
  const told = {};
  for (const adapter of bundle.adapters) told[adapter] = await bundle.answer(PROMPT, { adapter });
  assert.deepEqual(told, { echo: " river river", mirror: " revir", shout: " RIVER!" });
});

test("rows of a batch have adapters of their own", async () => {
  const adapters = ["shout", null, { echo: 0.5, mirror: 0.5 }];
  const ids = await bundle.encode(PROMPT);
  const together = await bundle.start(3, { adapter: adapters });
  const batch = await together.extend([ids, ids.slice(0, 3), ids]);
  for (const [row, adapter] of adapters.entries()) {
    const alone = await bundle.start(1, { adapter });
    const [logits] = await alone.extend([row === 1 ? ids.slice(0, 3) : ids]);
    logits.forEach((x, i) => assert.ok(Math.abs(x - batch[row][i]) < 1e-4));
  }
});

test("no adapter input has a dimension of size 0, which WebGPU does not take", async () => {
  for (const adapter of [null, "shout", { shout: 0.5 }, { echo: 0.5, mirror: 0.5 }]) {
    const feeds = await bundle.feeds(adapter);
    assert.ok(Object.keys(feeds).some((name) => name.endsWith(".A")));
    for (const [name, { dims }] of Object.entries(feeds)) {
      assert.ok(Math.min(...dims) > 0, `${name} is [${dims}]`);
    }
  }
});

test("a row that rests goes on as if nothing had been", async () => {
  const rows = [[1, 2, 3], [4, 5]];
  const resting = await bundle.start(2);
  await resting.extend(rows);
  await resting.step([7, null]);
  const [, found] = await resting.step([8, 9]);
  const awake = await bundle.start(1);
  const [wanted] = await awake.extend([[4, 5, 9]]);
  wanted.forEach((x, i) => assert.ok(Math.abs(x - found[i]) < 1e-4));
  assert.deepEqual(resting.history, [[1, 2, 3, 7, 8], [4, 5, 9]]);
});

test("tokens stream, and a signal stops them", async () => {
  const stop = new AbortController();
  const seen = [];
  await assert.rejects(async () => {
    for await (const token of bundle.generate(PROMPT, { adapter: "echo", signal: stop.signal })) {
      seen.push(token);
      if (seen.length === 2) stop.abort();
    }
  }, { name: "AbortError" });
  assert.equal(seen.length, 2);
});

test("labels of heads of unequal sizes", async () => {
  const heads = await open(labels, { ort, Tokenizer });
  const found = await heads.classify(["a river", "a river"], { adapter: ["letters", "claims"] });
  for (const [index, name] of ["letters", "claims"].entries()) {
    const told = found[index].map(({ label }) => label);
    assert.deepEqual(told.sort(), [...heads.manifest.adapters[name].labels].sort());
    assert.ok(Math.abs(found[index].reduce((sum, { score }) => sum + score, 0) - 1) < 1e-6);
  }
  assert.deepEqual(scores([0, 0], true), [0.5, 0.5]);
  const row = (ids) => heads.outputs([{ input_ids: ids }], { adapter: "letters" });
  await assert.rejects(row([1e6]), /token id 1000000 is outside the vocabulary/);
  await assert.rejects(row(Array(9999).fill(1)), /a row has 9999 tokens, the model has/);
  await assert.rejects(heads.classify(["a"]), /the base has no task head .*; choose an adapter/);
});

test("a bundle at an address is the one in the folder", async () => {
  const server = createServer(async (request, response) => {
    response.end(await readFile(path.join(text, request.url)));
  });
  await new Promise((ready) => server.listen(0, ready));
  const address = `http://localhost:${server.address().port}`;
  const feeds = await (await open(address, { ort, session: false })).feeds("echo");
  const own = await bundle.feeds("echo");
  assert.deepEqual(Object.keys(feeds).sort(), Object.keys(own).sort());
  server.close();
});

test("what was changed or cut off is refused by name", async () => {
  const copy = path.join(await mkdtemp(path.join(tmpdir(), "bundle-")), "b");
  await cp(text, copy, { recursive: true, dereference: true });
  const file = path.join(copy, "adapters", "echo", "adapter.onnx_adapter");
  const bytes = await readFile(file);
  bytes[bytes.length - 3] ^= 1;
  await writeFile(file, bytes);
  const changed = await open(copy, { ort });
  const refused = { name: "BundleError", message: /echo.* differs from its hash/ };
  await assert.rejects(changed.start(1, { adapter: "echo" }), refused);
  await changed.start(1, { adapter: "mirror" });
  for (let end = 0; end < bytes.length; end += 997) {
    assert.throws(() => parseAdapter(bytes.subarray(0, end)), BundleError);
  }
});

test("what is asked wrongly is refused in words", async () => {
  for (const [adapter, words] of [
    ["nobody", /there is no adapter 'nobody'; the bundle has echo, mirror, none, shout/],
    [{ echo: Number.NaN }, /the weight of 'echo' is NaN/],
    [["echo"], /1 adapters were given for 2 rows/],
  ]) {
    await assert.rejects(bundle.start(2, { adapter }), { name: "BundleError", message: words });
  }
  const decoding = await bundle.start(1);
  await assert.rejects(decoding.extend([[1e6]]), /token id 1000000 is outside the vocabulary/);
  await assert.rejects(decoding.extend([[]]), /row 0 has no tokens/);
  await assert.rejects(open(text, {}), /ort is missing/);
});

test("float16 is rounded to nearest, ties to even", () => {
  const given = [0, -0, 1, -2, 65504, 2 ** -24, 2 ** -25, 1.5 * 2 ** -24, 1 + 2 ** -11, 1 + 3 * 2 ** -11];
  const bits = [0, 0x8000, 0x3c00, 0xc000, 0x7bff, 1, 0, 2, 0x3c00, 0x3c02];
  assert.deepEqual(Array.from(toHalf(Float32Array.from(given))), bits);
  assert.throws(() => toHalf(Float32Array.of(70000)), /float16 ends at 65504/);
});

test("sampling keeps to top-k and top-p", () => {
  const logits = Float32Array.of(1, 3, 2, 0);
  assert.equal(sampled(logits, { temperature: 1, topK: 1 }, () => 0.99), 1);
  assert.equal(sampled(logits, { temperature: 1, topP: 0.5 }, () => 0.99), 1);
  assert.equal(sampled(logits, { temperature: 1 }, () => 0.999), 3);
});

/** As much of a bundle as `poolingOf` reads. */
const holding = (files) => ({ manifest: { files }, json: async (name) => files[name] ?? null });
const MODULES = [
  { type: "sentence_transformers.models.Transformer", path: "" },
  { type: "sentence_transformers.models.Pooling", path: "1_Pooling" },
  { type: "sentence_transformers.models.Normalize", path: "2_Normalize" },
];

test("embeddings are pooled as the files say", async () => {
  const files = { "modules.json": MODULES, "1_Pooling/config.json": { pooling_mode_cls_token: true } };
  const prompts = { prompts: { query: "query: " }, default_prompt_name: "query" };
  const told = await poolingOf(holding({ ...files, "config_sentence_transformers.json": prompts }));
  assert.deepEqual(told, { mode: "cls", normalize: true, prompt: "query: ", longest: Infinity });
  assert.deepEqual(Array.from(pooled(Float32Array.of(3, 4, 9, 9), 2, told)), [0.6, 0.8].map(Math.fround));
  const mean = await poolingOf(holding({}));
  assert.deepEqual(Array.from(pooled(Float32Array.of(1, 2, 3, 6), 2, mean)), [2, 4]);
});

test("what the files ask for and is not done is refused by name", async () => {
  const pooling = { pooling_mode_mean_tokens: true };
  const files = { "modules.json": MODULES, "1_Pooling/config.json": pooling };
  const prompts = { prompts: { query: "q: " }, default_prompt_name: "query" };
  for (const [more, words, adapters] of [
    [{ "sentence_bert_config.json": { do_lower_case: true } }, /texts are lowered/],
    [{ "1_Pooling/config.json": { pooling_mode_max_tokens: true } }, /pooling is not known/],
    [{ "modules.json": [...MODULES, { type: "x.Dense", path: "3_Dense" }] }, /module 'Dense'/],
    [
      {
        "1_Pooling/config.json": { ...pooling, include_prompt: false },
        "config_sentence_transformers.json": prompts,
      },
      /prompt's tokens are left out/,
    ],
    [{ "adapters/a/sentence_transformers/modules.json": [] }, /'a' makes embeddings in a way/, ["a"]],
  ]) {
    const refused = { name: "BundleError", message: words };
    await assert.rejects(poolingOf(holding({ ...files, ...more }), adapters), refused);
  }
});
