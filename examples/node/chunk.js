// Writes one chunk of keys and values, retrieves it, and verifies its checksums: a client in another language.
//
//   npm install
//   node chunk.js HOST:PORT [KEY]
//
// HOST:PORT is that of `kvbank serve`, KEY the caller's key where the service asks for one. What the fields are, and what
// a client must verify: docs/protocol.md.
import { randomBytes } from "node:crypto";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { xxhash3 } from "hash-wasm";

const PROTO = process.env.KVBANK_PROTO ?? fileURLToPath(new URL("../../proto", import.meta.url));
// 64-bit integers as strings, because a number of JavaScript has 53 bits.
const OPTIONS = { includeDirs: [PROTO], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const FRAME_BYTES = 1 << 20;
const [BANK, READER, EMBEDDER] = ["node", "a1".repeat(32), "b2".repeat(32)];
const [HEADS, TOKENS, HEAD_DIM] = [2, 3, 8];

function connect(address, key) {
  const { kvbank } = grpc.loadPackageDefinition(loadSync("kvbank/v1/service.proto", OPTIONS));
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  // Beyond this machine: grpc.credentials.createSsl(), or keys can be read on the way.
  const client = new kvbank.v1.MemoryService(address, grpc.credentials.createInsecure());
  return { client, metadata };
}

function ask({ client, metadata }, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function checksum(bytes, seed = 0n) {
  return BigInt(`0x${await xxhash3(bytes, Number(seed & 0xffffffffn), Number(seed >> 32n))}`);
}

const floats = (count, value) => Buffer.from(new Float32Array(count).fill(value).buffer);

async function described(name, dtype, shape, bytes) {
  return { name, dtype, shape, length: bytes.length, checksum: String(await checksum(bytes)) };
}

async function write({ client, metadata }, chunk, bytes) {
  const stream = client.WriteChunks(metadata);
  stream.write({ header: { bank: BANK, reader_digest: READER, embedder_digest: EMBEDDER, chunk } });
  for (let begin = 0; begin < bytes.length; begin += FRAME_BYTES) {
    stream.write({ data: bytes.subarray(begin, begin + FRAME_BYTES) });
  }
  stream.end();
  for await (const ack of stream) return ack; // the chunk is durable
  throw new Error("the stream ended without an acknowledgement");
}

async function retrieve({ client, metadata }, queries) {
  const request = { banks: [BANK], reader_digest: READER, embedder_digest: EMBEDDER, queries, top_k: 1 };
  let header;
  const parts = [];
  for await (const frame of client.Retrieve(request, metadata)) {
    if (frame.frame === "header") header = frame.header;
    else parts.push(frame.data);
  }
  return { header, bytes: Buffer.concat(parts) };
}

async function tensors({ header, bytes }) {
  const found = {};
  let begin = 0;
  for (const [index, chunk] of header.chunks.entries()) {
    if (!header.sent[index]) continue;
    for (const { name, length, checksum: expected } of chunk.payload.tensors) {
      const part = bytes.subarray(begin, (begin += Number(length)));
      const right = part.length === Number(length) && (await checksum(part, BigInt(chunk.payload.seed))) === BigInt(expected);
      if (!right) throw new Error(`tensor ${name} of chunk ${chunk.chunk_id} is damaged`);
      found[name] = part;
    }
  }
  if (begin !== bytes.length) throw new Error("there are more bytes than the descriptors say");
  return found;
}

async function main(address, key) {
  const service = connect(address, key);
  const kv = { reader_digest: READER, layers: [1], kv_heads: HEADS, head_dim: HEAD_DIM, dtype: "DATA_TYPE_FP32" };
  const embedding = { embedder_digest: EMBEDDER, dimension: 4 };
  await ask(service, "CreateBank", { bank: { name: BANK, kv, embedding } });

  const shape = [HEADS, TOKENS, HEAD_DIM];
  const values = [floats(HEADS * TOKENS * HEAD_DIM, 1), floats(HEADS * TOKENS * HEAD_DIM, 2)];
  const positions = Buffer.from(new Int32Array([0, 1, 2]).buffer);
  const descriptors = [
    await described("k.1", "DATA_TYPE_FP32", shape, values[0]),
    await described("v.1", "DATA_TYPE_FP32", shape, values[1]),
    await described("pos.1", "DATA_TYPE_INT32", [TOKENS], positions),
  ];
  const producer = { method: "none", version: "1", context: "isolated" };
  const vector = Buffer.from(new Float32Array([1, 0, 0, 0]).buffer);
  const chunk = {
    idempotency_key: randomBytes(16), // again with the same key, where no acknowledgement came
    original_length: TOKENS,
    stored_length: TOKENS,
    token_ids: [5, 6, 7],
    text: "three tokens",
    embedding: vector,
    payload: { kind: "PAYLOAD_KIND_LAYER_KV", tensors: descriptors, producer },
  };
  const ack = await write(service, chunk, Buffer.concat([...values, positions]));
  const answer = await retrieve(service, vector);
  const read = await tensors(answer);
  const [hit] = answer.header.queries[0].hits;
  if (!read["k.1"].equals(values[0]) || !read["v.1"].equals(values[1])) throw new Error("other bytes came back");
  console.log(JSON.stringify({ written: ack.chunk_id, found: hit.chunk_id, verified: Object.keys(read) }));
  service.client.close();
}

if (process.argv.length < 3) {
  console.error("usage: node chunk.js HOST:PORT [KEY]");
  process.exitCode = 2;
} else {
  main(...process.argv.slice(2, 4)).catch((error) => {
    console.error(`${error.message}`);
    process.exitCode = 1;
  });
}
