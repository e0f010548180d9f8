// Fills the page from /overview every few seconds. Names come from the mesh:
// they only ever become text nodes, never markup.
"use strict";

const EVERY_MS = 5000;

const byId = (id) => document.getElementById(id);

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}

function time(text) {
  return text ? text.replace("T", " ").replace(/\.\d+/, "") : "-";
}

function cell(tag, text, kind) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// A column: its title, what it shows of a row, and perhaps its class.
function table(id, rows, columns) {
  const head = document.createElement("tr");
  columns.forEach(([title]) => head.append(cell("th", title)));
  const lines = rows.map((row) => {
    const line = document.createElement("tr");
    columns.forEach(([, show, kind]) => {
      const name = typeof kind === "function" ? kind(row) : kind;
      line.append(cell("td", show(row), name));
    });
    return line;
  });
  if (!lines.length) {
    const none = cell("td", "none");
    none.colSpan = columns.length;
    const line = document.createElement("tr");
    line.append(none);
    lines.push(line);
  }
  byId(id).replaceChildren(head, ...lines);
}

function show(data) {
  const { status } = data;
  byId("node").textContent = status.node;
  byId("health").textContent = status.ready ? "ready" : `not ready: ${status.pending.join(", ")}`;
  byId("health").className = status.ready ? "ready" : "unready";
  const facts = [
    ["version", status.version],
    ["started", time(status.started_at)],
    ["trust domain", status.trust_domain],
    ["capture", status.capture.in_force],
    ["mesh state", `${status.state.workloads} workloads, ${status.state.services} services, `
      + `${status.state.policies} policies (version ${status.state.version})`],
  ];
  byId("summary").replaceChildren(
    ...facts.flatMap(([name, value]) => [cell("dt", name), cell("dd", value)]));
  byId("warnings").replaceChildren(...status.warnings.map((each) => cell("li", each)));
  table("pods", data.pods, [
    ["Pod", (pod) => pod.pod],
    ["State", (pod) => pod.reason || pod.state, (pod) => (pod.reason ? "bad" : "")],
    ["Identity", (pod) => pod.identity],
    ["Addresses", (pod) => pod.addresses.join(", ")],
    ["Connections", (pod) => pod.connections, "number"],
  ]);
  table("certs", data.certs, [
    ["Identity", (cert) => cert.identity],
    ["State", (cert) => cert.state, (cert) => (cert.state === "valid" ? "" : "bad")],
    ["Not after", (cert) => time(cert.not_after)],
    ["Renewed at", (cert) => time(cert.renew_at)],
  ]);
  table("flows", data.flows, [
    ["Source", (flow) => flow.source],
    ["Destination", (flow) => flow.destination],
    ["Connections", (flow) => flow.connections, "number"],
    ["Sent", (flow) => size(flow.bytes_sent), "number"],
    ["Received", (flow) => size(flow.bytes_received), "number"],
  ]);
  table("denials", data.denials, [
    ["Time", (denial) => time(denial.at)],
    ["Direction", (denial) => denial.direction],
    ["Source", (denial) => denial.source],
    ["Destination", (denial) => denial.destination],
    ["Reason", (denial) => denial.reason],
  ]);
  byId("total").textContent = `(${data.connections_total})`;
  table("connections", data.connections, [
    ["Direction", (one) => one.direction],
    ["Pod", (one) => one.pod],
    ["Source", (one) => one.source],
    ["Destination", (one) => one.destination],
    ["Protocol", (one) => one.protocol],
    ["Peer", (one) => one.peer_identity || "-"],
    ["Sent", (one) => size(one.bytes_sent), "number"],
    ["Received", (one) => size(one.bytes_received), "number"],
  ]);
}

function fail(text) {
  byId("health").textContent = text;
  byId("health").className = "unready";
}

async function refresh() {
  try {
    const answer = await fetch("overview", { cache: "no-store" });
    if (answer.ok) show(await answer.json());
    else fail(await answer.text());
  } catch (error) {
    fail(`the agent does not answer: ${error.message}`);
  }
}

refresh();
setInterval(refresh, EVERY_MS);
