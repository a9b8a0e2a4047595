// Sends the requests of a file in rotation; prints the figures as one line of JSON.

import { readFileSync } from 'node:fs'

import autocannon from 'autocannon'

const [url, file, connections, seconds] = process.argv.slice(2)
const requests = JSON.parse(readFileSync(file, 'utf8')).map((request) => ({ ...request, body: request.body || undefined }))

// Start at a random request: the server may still cache the user of the last run's first request.
const first = Math.floor(Math.random() * requests.length)
let clients = 0
const times = []
let refused = 0

const run = autocannon({
  url,
  connections: Number(connections),
  duration: Number(seconds),
  timeout: 10,
  requests,
  // Connections start at different requests, so that they do not act for the same user at the same time.
  setupClient(client) {
    const start = (first + Math.floor((clients++ * requests.length) / Number(connections))) % requests.length
    client.setRequests([...requests.slice(start), ...requests.slice(0, start)])
  },
})
// autocannon's own histogram has a resolution of 1 ms.
run.on('response', (_client, status, _bytes, time) => {
  times.push(time)
  if (status >= 400) refused += 1
})
const result = await run
times.sort((a, b) => a - b)
const percentile = (share) => times[Math.min(times.length - 1, Math.floor(times.length * share))] ?? 0
console.log(
  JSON.stringify({
    requests: times.length,
    seconds: result.duration,
    p50: percentile(0.5),
    p99: percentile(0.99),
    refused,
    errors: result.errors + result.timeouts,
  }),
)
