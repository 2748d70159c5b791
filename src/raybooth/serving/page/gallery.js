// The pictures that this browser keeps: the newest few hundred, in IndexedDB, grouped by the request they came from.

const STORE = "pictures";
const MOST = 300;

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("raybooth", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function within(mode, work) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

// A picture: { group, time, of, title, steps } of its request, and { model, prompt, seed, base, bytes } of its own; `base` if it is there for comparison.
// `bytes` is a Blob, which the browser holds once, and once on its disk, however often it is shown.
// Returns its id.
export async function keep(picture) {
  const id = await within("readwrite", (store) => store.add(picture));
  const ids = await within("readonly", (store) => store.getAllKeys());
  await forget(ids.slice(0, Math.max(0, ids.length - MOST)));
  return id;
}

export const forget = (ids) => within("readwrite", (store) => ids.forEach((id) => store.delete(id)));
export const forgetAll = () => within("readwrite", (store) => store.clear());

// The newest group first; within a group by seed, the subject's picture before the base model's.
export async function groups() {
  const found = new Map();
  for (const picture of await within("readonly", (store) => store.getAll())) {
    if (!found.has(picture.group)) found.set(picture.group, []);
    found.get(picture.group).push(picture);
  }
  const order = (a, b) => a.seed - b.seed || a.base - b.base;
  return [...found.values()].map((pictures) => pictures.sort(order)).sort((a, b) => b[0].time - a[0].time);
}
