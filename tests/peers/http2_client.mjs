// SPDX-License-Identifier: Apache-2.0
// An HBONE client made of node's own tls and http2 alone:
//
//   node http2_client.mjs ADDR PORT AUTHORITY METHOD CA.pem [CERT.pem KEY.pem] <bytes >answer
//
// Sends stdin into the tunnel, prints what comes back, and says on stderr how
// it went: one JSON object with the status, or the error and the stage it came at.
import { readFileSync } from "node:fs";
import http2 from "node:http2";
import tls from "node:tls";

const LIMIT_MS = 10_000;
const [address, port, authority, method, ca, cert, key] = process.argv.slice(2);
const outcome = {};
let stage = "connect";

function finish(error) {
  if (error) Object.assign(outcome, { stage, error: `${error.code ?? ""} ${error.message}`.trim() });
  process.stderr.write(JSON.stringify(outcome) + "\n", () => process.exit(0));
}

setTimeout(() => finish(new Error(`nothing within ${LIMIT_MS} ms`)), LIMIT_MS);

const socket = tls.connect({
  host: address,
  port: Number(port),
  ca: readFileSync(ca),
  cert: cert && readFileSync(cert),
  key: key && readFileSync(key),
  ALPNProtocols: ["h2"],
  minVersion: "TLSv1.3",
  // node checks the chain; who the peer is, is no DNS name: the test judges the SPIFFE id.
  checkServerIdentity: (_host, peer) => void (outcome.peer = peer.subjectaltname.replace(/^URI:/, "")),
});
socket.once("error", finish);
socket.once("secureConnect", () => {
  outcome.alpn = socket.alpnProtocol;
  stage = "h2";
  socket.off("error", finish);
  const session = http2.connect("https://hbone.invalid", { createConnection: () => socket });
  session.once("error", finish);
  const headers = { ":method": method, ":authority": authority };
  if (method !== "CONNECT") Object.assign(headers, { ":path": "/", ":scheme": "https" });
  const stream = session.request(headers, { endStream: false });
  const answer = [];
  stage = "request";
  stream.once("error", finish);
  stream.once("response", (fields) => {
    outcome.status = fields[":status"];
    stage = "body";
  });
  stream.on("data", (bytes) => answer.push(bytes));
  stream.once("end", () => {
    process.stdout.write(Buffer.concat(answer), () => finish());
  });
  process.stdin.pipe(stream);
});
