// A request as what people paste into a terminal or a notebook.

import { $ } from "./dom.js";
import { hasKey } from "./server.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(request) {
  const lines = [`curl ${location.origin}/v1/images/generations`, "-H 'Content-Type: application/json'"];
  if (hasKey()) lines.push('-H "Authorization: Bearer $RAYBOOTH_KEY"');
  lines.push(`-d ${quoted(JSON.stringify({ ...request, response_format: "b64_json" }))}`);
  const files = request.n === 1 ? "base64 --decode > picture.png" : 'while read -r p; do echo "$p" | base64 --decode > picture-$((i++)).png; done';
  return `${lines.join(" \\\n  ")} \\\n  | jq -r '.data[].b64_json' | ${files}`;
}

export function python(request) {
  const { model, prompt, n, ...rest } = request;
  const key = hasKey() ? 'os.environ["RAYBOOTH_KEY"]' : '"none"';
  return `import base64${hasKey() ? ", os" : ""}
from pathlib import Path
from openai import OpenAI

client = OpenAI(base_url=${text(`${location.origin}/v1`)}, api_key=${key})
drawn = client.images.generate(
    model=${text(model)},
    prompt=${text(prompt)},
    n=${n},
    response_format="b64_json",
    extra_body={${Object.entries(rest).map(([k, v]) => `"${k}": ${v}`).join(", ")}},
)
for i, picture in enumerate(drawn.data):
    Path(f"picture-{i}.png").write_bytes(base64.b64decode(picture.b64_json))`;
}

export async function copy() {
  const text = $("snippet").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren($("snippet")); // without https there is no clipboard but this one
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// JSON's strings are Python's too.
const text = (value) => JSON.stringify(value);
