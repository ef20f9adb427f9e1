/**
 * node page.mjs MODULES ADDRESS VERB [SHOTS]: what a person sees who clicks through a kit's page.
 * MODULES has playwright-core. Prints one JSON object; with SHOTS, writes pictures there.
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , modules, address, verb, shots] = process.argv;
const require = createRequire(pathToFileURL(`${modules}/package.json`));
const { chromium } = require("playwright-core");
const places = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const browser = await chromium.launch({
  executablePath: process.env.LORA_EDGE_CHROMIUM ?? places.find((each) => existsSync(each)),
  args: ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"],
});
const page = await browser.newPage();
const seen = { foreign: [], console: [], answers: {} };
page.on("request", (request) => {
  if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(address)) {
    seen.foreign.push(request.url());
  }
});
page.on("console", (message) => seen.console.push(message.text()));
page.on("pageerror", (error) => seen.console.push(String(error)));

const text = (selector) => page.locator(selector).textContent();
const choose = (name) => page.getByRole("radio", { name, exact: true }).check({ force: true });
async function send() {
  await page.locator("#go").click();
  await page.waitForFunction(() => !document.querySelector("form").hasAttribute("aria-busy"));
  if (await page.locator("#error").isVisible()) throw new Error(await text("#error"));
}
async function pictures(name) {
  seen.wide ??= [];
  for (const width of [390, 1280]) {
    for (const colorScheme of ["light", "dark"]) {
      await page.setViewportSize({ width, height: width === 390 ? 844 : 800 });
      await page.emulateMedia({ colorScheme });
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      if (wide > 0) seen.wide.push(`${name} at ${width}`);
      if (shots) await page.screenshot({ path: `${shots}/${verb}-${name}-${width}-${colorScheme}.png` });
    }
  }
}
const names = async () =>
  (await page.locator("input[name=adapter][data-kind=one]").all()).map((each) =>
    each.getAttribute("value"),
  );

/** Everything that can be used has a name for those who do not see it. */
async function unnamed() {
  return page.evaluate(() =>
    [...document.querySelectorAll("input, select, textarea, button, meter")]
      .filter((each) => !each.labels?.length && !each.ariaLabel && !each.textContent.trim())
      .map((each) => each.outerHTML),
  );
}

const visits = {
  async generate() {
    await page.locator("#go").click();
    seen.empty = await text("#error");
    await page.locator("#prompt").fill("Word: river Answer:");
    await page.locator("#most").fill("24");
    for (const name of ["no adapter", ...(await Promise.all(await names()))]) {
      await choose(name);
      await send();
      seen.answers[name] = await text("#answer");
    }
    seen.status = await text("#status");
    if (await page.locator("#blend").count()) {
      await choose("a blend");
      await page.locator("#second").selectOption("mirror");
      await page.locator("#share").focus();
      await page.keyboard.press("End");
      seen.shares = await text("#shares");
      await send();
      seen.answers["all of mirror"] = await text("#answer");
      await page.locator("#share").fill("50");
      await send();
      seen.answers.blend = await text("#answer");
    }
    await pictures("done");
    await choose("shout");
    await page.locator("#most").fill("4000");
    await page.locator("#prompt").fill("1");
    await page.locator("#prompt").focus();
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => /^[2-9] tokens|^\d\d+ tokens/.test(document.querySelector("#status").textContent));
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => !document.querySelector("form").hasAttribute("aria-busy"));
    seen.stopped = await text("#status");
    await page.locator("#prompt").fill("word ".repeat(600));
    await page.locator("#go").click();
    await page.locator("#error").waitFor();
    seen.long = await text("#error");
    await pictures("error");
  },
  async classify() {
    await page.locator("#text").fill("stone=enots");
    for (const name of await Promise.all(await names())) {
      await choose(name);
      await send();
      const lines = await page.locator("#labels li").all();
      seen.answers[name] = await Promise.all(lines.map(async (each) => {
        const [label, share] = await each.locator("span").allTextContents();
        return [label, share, await each.locator("meter").getAttribute("aria-label")];
      }));
    }
    await pictures("done");
  },
  async embed() {
    await page.locator("#one").fill("stone=enots");
    await page.locator("#two").fill("stone=enots");
    await send();
    seen.answers.same = await text("#similarity");
    await page.locator("#two").fill("river=RIVER");
    for (const name of ["no adapter", ...(await Promise.all(await names()))]) {
      await choose(name);
      await send();
      seen.answers[name] = await text("#similarity");
    }
    await pictures("done");
  },
};

let code = 0;
try {
  await page.goto(address);
  await page.waitForFunction(() => !/^Loading/.test(document.querySelector("#status").textContent));
  if (await page.locator("#error").isVisible()) throw new Error(await text("#error"));
  seen.isolated = await page.evaluate(() => globalThis.crossOriginIsolated);
  seen.unnamed = await unnamed();
  await pictures("start");
  await visits[verb]();
} catch (error) {
  seen.failed = String(error.message);
  code = 1;
}
console.log(JSON.stringify(seen, null, 1));
await browser.close();
process.exit(code);
