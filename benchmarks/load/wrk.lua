-- Sends the requests of a file in rotation; prints the figures as one line of JSON.

local requests, last = {}, 0

function init(arguments)
  requests = dofile(arguments[1])
  -- Start at a random request: the server may still cache the user of the last run's first request.
  math.randomseed(os.time())
  last = math.random(#requests)
end

function request()
  last = last % #requests + 1
  return requests[last]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50": %.4f, "p99": %.4f, "refused": %d, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout
  ))
end
