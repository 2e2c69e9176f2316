-- The script of wrk: each worker of the list sends its heartbeat in turn, with its token, session and rising number.
-- Arguments: the file of the workers (one a line: token, session, the rest of the body; tab between), the first number,
-- the number of threads, and a header line for all requests or nothing.
local threads = {}
local number_of_threads = 0

function setup(thread)
   thread:set("part", number_of_threads)
   number_of_threads = number_of_threads + 1
   table.insert(threads, thread)
end

function init(arguments)
   local share, at = tonumber(arguments[3]), 0
   local more = arguments[4] and (arguments[4] .. "\r\n") or ""
   heads, tails, position, seq = {}, {}, 0, tonumber(arguments[2])
   statuses = ""
   refused = 0
   for line in io.lines(arguments[1]) do
      if at % share == part then
         local token, session, rest = line:match("^(.-)\t(.-)\t(.*)$")
         local front = '{"session_id":"' .. session .. '","seq":'
         -- Numbers have ten digits throughout, so the length never changes.
         local length = #front + 10 + 1 + #rest
         heads[#heads + 1] = "POST /api/heartbeat HTTP/1.1\r\nHost: manager_proxy\r\nAuthorization: Bearer " .. token
            .. "\r\n" .. more .. "Content-Type: application/json\r\nContent-Length: " .. length .. "\r\n\r\n" .. front
         tails[#tails + 1] = "," .. rest
      end
      at = at + 1
   end
   -- Each run begins at another worker, so that a short one does not leave the same ones out every time.
   position = math.floor(seq / 10000) * 7919 % #heads
end

function request()
   position = position + 1
   if position > #heads then
      position, seq = 1, seq + 1
   end
   return heads[position] .. string.format("%010d", seq) .. tails[position]
end

function response(status, headers, body)
   if status ~= 200 then
      refused = refused + 1
      if #statuses < 400 then statuses = statuses .. status .. " " .. body .. " " end
   end
end

function done(summary, latency, requests)
   local refused, answers = 0, ""
   for _, thread in ipairs(threads) do
      refused = refused + thread:get("refused")
      answers = answers .. thread:get("statuses")
   end
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests":%d,"seconds":%f,"refused":%d,"broken":%d,"p50":%f,"p95":%f,"p99":%f}\n',
      summary.requests, summary.duration / 1e6, refused, errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50) / 1e6, latency:percentile(95) / 1e6, latency:percentile(99) / 1e6))
   if refused > 0 then io.stderr:write(answers:sub(1, 400) .. "\n") end
end
