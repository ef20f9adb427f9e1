/** node server.mjs: this folder's files, for this machine alone. PORT names another port. */
import { createReadStream, existsSync, realpathSync, statSync } from "node:fs";
import { createServer } from "node:http";
import path from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = path.dirname(fileURLToPath(import.meta.url));
const PORT = Number(process.env.PORT ?? 8080);
const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".mjs": "text/javascript; charset=utf-8",
  ".wasm": "application/wasm",
};
const HEADERS = {
  "cache-control": "no-cache",
  "x-content-type-options": "nosniff",
  // With these two a page may use threads.
  "cross-origin-embedder-policy": "require-corp",
  "cross-origin-opener-policy": "same-origin",
};

/** The file of a request; null where there is none in this folder. */
function fileOf(url) {
  let parts;
  try {
    parts = decodeURIComponent(new URL(url, "http://localhost").pathname).split("/").filter(Boolean);
  } catch {
    return null;
  }
  if (parts.some((part) => part.startsWith(".") || /[\\\0]/.test(part))) return null;
  const file = path.join(ROOT, ...(parts.length ? parts : ["index.html"]));
  return existsSync(file) && statSync(file).isFile() ? realpathSync(file) : null;
}

const server = createServer((request, response) => {
  const file = ["GET", "HEAD"].includes(request.method) ? fileOf(request.url) : null;
  if (!file) {
    response.writeHead(404, { ...HEADERS, "content-type": "text/plain" });
    response.end("There is no such file.\n");
    return;
  }
  const type = TYPES[path.extname(file)] ?? "application/octet-stream";
  const length = statSync(file).size;
  response.writeHead(200, { ...HEADERS, "content-type": type, "content-length": length });
  if (request.method === "HEAD") response.end();
  else createReadStream(file).on("error", () => response.destroy()).pipe(response);
});

if (!existsSync(path.join(ROOT, "node_modules", "onnxruntime-web"))) {
  console.error("onnxruntime-web is not installed. Run: npm install");
  process.exit(1);
}
server.on("error", (error) => {
  const taken = error.code === "EADDRINUSE";
  console.error(taken ? `Port ${PORT} is taken. Try: PORT=${PORT + 1} npm start` : error.message);
  process.exit(1);
});
server.listen(PORT, "127.0.0.1", () => {
  console.log(`http://localhost:${server.address().port}  (Ctrl+C ends it)`);
});
