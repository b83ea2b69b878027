# The table of bench.sh: lines of round, contestant, place, figure, quantity, value; round 0 does not count.

$1 > 0 {
  key = $3 SUBSEP $4 SUBSEP $5
  if (!(key in seen)) { seen[key] = 1; keys[++count] = key }
  value[key, $2, $1] = $6
  if ($1 > rounds) rounds = $1
}

# The middle of list[1..n], which gets sorted.
function median(list, n,    i, j, moved) {
  for (i = 2; i <= n; i++) {
    moved = list[i]
    for (j = i - 1; j >= 1 && list[j] > moved; j--) list[j + 1] = list[j]
    list[j + 1] = moved
  }
  if (n == 0) return ""
  return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
}

# Over the rounds that have it.
function typical(key, who,    list, n, r) {
  for (r = 1; r <= rounds; r++) if ((key, who, r) in value) list[++n] = value[key, who, r] + 0
  return median(list, n + 0)
}

# Of Culvert to ztunnel, within a round.
function ratio(key,    list, n, r) {
  for (r = 1; r <= rounds; r++)
    if ((key, "culvert", r) in value && (key, "ztunnel", r) in value && value[key, "ztunnel", r] > 0)
      list[++n] = value[key, "culvert", r] / value[key, "ztunnel", r]
  if (n == 0) return "–"
  middle = median(list, n)
  return n == 1 ? sprintf("×%.2f", middle) : sprintf("×%.2f (%.2f–%.2f)", middle, list[1], list[n])
}

# Three digits that mean something.
function number(x) {
  if (x == "") return "–"
  if (x >= 100) return sprintf("%.0f", x)
  if (x >= 10) return sprintf("%.1f", x)
  if (x >= 1) return sprintf("%.2f", x)
  return sprintf("%.4f", x)
}

BEGIN {
  unit["gbit_per_s"] = "Gbit/s"; unit["per_s"] = "per s"; unit["p50_us"] = "p50 µs"; unit["p99_us"] = "p99 µs"
  unit["cpu_s_per_gb"] = "CPU s/GB"; unit["cpu_s_per_1000"] = "CPU s/1,000"
  place["same"] = "same node"; place["across"] = "across nodes"
}

END {
  if (!count) { print "no round counts yet" > "/dev/stderr"; exit 1 }
  print "| where | figure | | no mesh | ztunnel | Culvert | Culvert to ztunnel |"
  print "|---|---|---|---|---|---|---|"
  for (i = 1; i <= count; i++) {
    split(keys[i], part, SUBSEP)
    printf "| %s | %s | %s | %s | %s | %s | %s |\n", place[part[1]], part[2], unit[part[3]], \
      number(typical(keys[i], "none")), number(typical(keys[i], "ztunnel")), number(typical(keys[i], "culvert")), ratio(keys[i])
  }
}
