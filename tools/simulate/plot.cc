#include "tools/simulate/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace tidepool {

namespace {

constexpr double kWidth = 860, kHeight = 300;  // of one chart
constexpr double kLeft = 70, kRight = 170, kTop = 34, kBottom = 46;
constexpr size_t kPointsMax = 1200;
// Okabe and Ito's palette: told apart by people who do not see all colours.
constexpr std::array<const char*, 8> kColors = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                "#E69F00", "#56B4E9", "#444444", "#B8A800"};

std::string Escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '&') {
      out += "&amp;";
    } else if (c == '"') {
      out += "&quot;";
    } else {
      out += c;
    }
  }
  return out;
}

std::string Short(double value) {
  if (value == 0) return "0";
  const double size = std::abs(value);
  if (size >= 1e6) return absl::StrFormat("%gM", value / 1e6);
  if (size >= 1e4) return absl::StrFormat("%gk", value / 1e3);
  return absl::StrFormat("%.4g", value);
}

// Round steps of 1, 2 or 5 times a power of ten, about `want` of them.
std::vector<double> Ticks(double low, double high, int want) {
  const double raw = (high - low) / want;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  double step = power;
  for (const double factor : {1.0, 2.0, 5.0, 10.0}) {
    step = factor * power;
    if (step >= raw) break;
  }
  std::vector<double> out;
  for (double t = std::ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) out.push_back(t);
  return out;
}

struct Frame {
  double x_low, x_high, y_low, y_high;
  bool log_x;
  double top;

  double X(double x) const {
    const double share =
        log_x ? std::log(x / x_low) / std::log(x_high / x_low) : (x - x_low) / (x_high - x_low);
    return kLeft + share * (kWidth - kLeft - kRight);
  }
  double Y(double y) const {
    return top + kHeight - kBottom - (y - y_low) / (y_high - y_low) * (kHeight - kTop - kBottom);
  }
};

Frame FrameOf(const Chart& chart, double top) {
  Frame f{.x_low = std::numeric_limits<double>::infinity(),
          .x_high = -std::numeric_limits<double>::infinity(),
          .y_low = 0,
          .y_high = chart.y_max,
          .log_x = chart.log_x,
          .top = top};
  for (const Series& s : chart.series) {
    for (const auto& [x, y] : s.points) {
      f.x_low = std::min(f.x_low, x);
      f.x_high = std::max(f.x_high, x);
      if (chart.y_max == 0) f.y_high = std::max(f.y_high, y * 1.05);
    }
  }
  if (!(f.x_low <= f.x_high)) f.x_low = f.x_high = chart.log_x ? 1 : 0;
  if (chart.log_x) {
    f.x_low = std::max(f.x_low, 1e-12);
    f.x_high = std::max(f.x_high, f.x_low * 1.1);
  } else if (f.x_high <= f.x_low) {
    f.x_high = f.x_low + 1;
  }
  if (!(f.y_high > 0)) f.y_high = 1;
  return f;
}

void RenderAxes(const Chart& chart, const Frame& f, std::string& out) {
  const double right = kWidth - kRight, bottom = f.top + kHeight - kBottom;
  absl::StrAppend(&out, "<text class=\"title\" x=\"", kLeft, "\" y=\"", f.top + 20, "\">",
                  Escape(chart.title), "</text>\n");
  for (const double y : Ticks(f.y_low, f.y_high, 5)) {
    absl::StrAppendFormat(&out, "<line class=\"grid\" x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\"/>", kLeft,
                          right, f.Y(y), f.Y(y));
    absl::StrAppendFormat(&out, "<text class=\"tick\" text-anchor=\"end\" x=\"%g\" y=\"%.1f\">%s</text>\n",
                          kLeft - 6, f.Y(y) + 4, Short(y));
  }
  std::vector<double> ticks;
  if (f.log_x) {
    for (double p = std::pow(10, std::floor(std::log10(f.x_low))); p <= f.x_high; p *= 10) {
      for (const double m : {1.0, 2.0, 5.0}) {
        const bool crowded = f.x_high / f.x_low > 1e3 && m != 1.0;
        if (!crowded && p * m >= f.x_low && p * m <= f.x_high) ticks.push_back(p * m);
      }
    }
  } else {
    ticks = Ticks(f.x_low, f.x_high, 8);
  }
  for (const double x : ticks) {
    absl::StrAppendFormat(&out, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\"/>", f.X(x),
                          f.X(x), f.top + kTop, bottom);
    absl::StrAppendFormat(&out, "<text class=\"tick\" text-anchor=\"middle\" x=\"%.1f\" y=\"%g\">%s</text>\n",
                          f.X(x), bottom + 16, Short(x));
  }
  absl::StrAppendFormat(&out, "<path class=\"axis\" d=\"M%g %gV%gH%g\"/>\n", kLeft, f.top + kTop, bottom,
                        right);
  absl::StrAppendFormat(&out, "<text class=\"label\" text-anchor=\"middle\" x=\"%g\" y=\"%g\">%s</text>\n",
                        (kLeft + right) / 2, bottom + 36, Escape(chart.x_label));
  const double middle = (f.top + kTop + bottom) / 2;
  absl::StrAppendFormat(
      &out,
      "<text class=\"label\" text-anchor=\"middle\" transform=\"translate(16 %g) rotate(-90)\">%s</text>\n",
      middle, Escape(chart.y_label));
}

void Render(const Chart& chart, double top, std::string& out) {
  const Frame f = FrameOf(chart, top);
  RenderAxes(chart, f, out);
  if (chart.x_mark > 0 && chart.x_mark >= f.x_low && chart.x_mark <= f.x_high) {
    absl::StrAppendFormat(&out, "<line class=\"mark\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\"/>",
                          f.X(chart.x_mark), f.X(chart.x_mark), top + kTop, top + kHeight - kBottom);
    absl::StrAppendFormat(&out, "<text class=\"tick\" x=\"%.1f\" y=\"%g\">%s</text>\n", f.X(chart.x_mark) + 4,
                          top + kTop + 10, Escape(chart.x_note));
  }
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const Series& s = chart.series[i];
    const char* color = kColors[i % kColors.size()];
    const char* dash = i >= kColors.size() ? " stroke-dasharray=\"5 3\"" : "";
    const size_t every = std::max<size_t>(1, s.points.size() / kPointsMax);
    std::string points, dots;
    for (size_t k = 0; k < s.points.size(); k += every) {
      const auto& [x, y] = s.points[k];
      if (f.log_x && !(x > 0)) continue;
      const double py = f.Y(std::min(y, f.y_high));
      absl::StrAppendFormat(&points, "%.1f,%.1f ", f.X(x), py);
      if (s.marks)
        absl::StrAppendFormat(&dots, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>", f.X(x), py,
                              color);
    }
    absl::StrAppend(&out, "<polyline fill=\"none\" stroke=\"", color, "\" stroke-width=\"1.6\"", dash,
                    " points=\"", points, "\"/>", dots, "\n");
    const double y = top + kTop + 12 + 18 * static_cast<double>(i);
    absl::StrAppendFormat(
        &out, "<line stroke=\"%s\" stroke-width=\"2.5\"%s x1=\"%g\" x2=\"%g\" y1=\"%g\" y2=\"%g\"/>", color,
        dash, kWidth - kRight + 12, kWidth - kRight + 32, y, y);
    absl::StrAppendFormat(&out, "<text class=\"tick\" x=\"%g\" y=\"%g\">%s</text>\n", kWidth - kRight + 38,
                          y + 4, Escape(s.name));
  }
}

Series Cdf(std::string name, const WeightedHistogram& values) {
  Series s{std::move(name), {}, false};
  for (const auto& step : values.Cdf()) s.points.emplace_back(step.seconds * 1e3, step.share);
  return s;
}

Series Cdf(std::string name, const std::vector<float>& values) {
  WeightedHistogram histogram;
  for (const float v : values) histogram.Add(v);
  return Cdf(std::move(name), histogram);
}

Series Line(std::string name, const std::vector<LoadSample>& load, float LoadSample::*which) {
  Series s{std::move(name), {}, false};
  for (const LoadSample& sample : load) s.points.emplace_back(sample.at, sample.*which);
  return s;
}

// Where a value stands on an axis: numbers as such, 12:4 (prefill and decode workers) at 12. False: nowhere.
bool AxisValue(const std::string& value, double& out) {
  return absl::SimpleAtod(value.substr(0, value.find(':')), &out);
}

// What tells results apart, but for `without`.
std::string NameOf(const SimResult& r, const std::string& without) {
  std::string out;
  for (const auto& [key, value] : r.settings) {
    if (key == without) continue;
    if (!out.empty()) out += " ";
    out += r.settings.size() > 2 ? key + "=" + value : value;
  }
  return out;
}

}  // namespace

std::string RenderSvg(const std::vector<Chart>& charts) {
  const double height = kHeight * static_cast<double>(std::max<size_t>(1, charts.size()));
  std::string out = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" width=\"%g\" height=\"%g\">\n", kWidth,
      height, kWidth, height);
  out +=
      "<style>text{font-family:system-ui,sans-serif;font-size:12px;fill:#222}.title{font-size:14px;"
      "font-weight:600}.tick{font-size:11px;fill:#555}.grid{stroke:#e4e4e4}.axis{stroke:#888;fill:none}"
      ".mark{stroke:#999;stroke-dasharray:4 4}</style>\n";
  absl::StrAppend(&out, "<rect width=\"", kWidth, "\" height=\"", height, "\" fill=\"#fff\"/>\n");
  for (size_t i = 0; i < charts.size(); ++i) Render(charts[i], kHeight * static_cast<double>(i), out);
  return out + "</svg>\n";
}

std::vector<Chart> ChartsOf(const SimResult& r) {
  std::vector<Chart> out;
  out.push_back({.title = "Load over time",
                 .x_label = "seconds",
                 .y_label = "load / objective",
                 .series = {Line("prefill", r.load, &LoadSample::prefill_load),
                            Line("decode", r.load, &LoadSample::decode_load)}});
  out.push_back({.title = "Time to first token",
                 .x_label = "milliseconds",
                 .y_label = "share of requests",
                 .series = {Cdf("TTFT", r.all.ttft)},
                 .log_x = true,
                 .y_max = 1,
                 .x_note = "objective",
                 .x_mark = r.slo_ttft_seconds * 1e3});
  out.push_back({.title = "Gaps between tokens",
                 .x_label = "milliseconds",
                 .y_label = "share of tokens",
                 .series = {Cdf("ITL", r.gaps)},
                 .log_x = true,
                 .y_max = 1,
                 .x_note = "objective",
                 .x_mark = r.slo_itl_seconds * 1e3});
  return out;
}

std::vector<Chart> ChartsOf(const std::vector<SimResult>& results, const std::vector<std::string>& keys) {
  std::string axis;
  double number = 0;
  for (const std::string& key : keys) {
    const bool numbers = std::all_of(results.begin(), results.end(), [&](const SimResult& r) {
      const auto it = r.settings.find(key);
      return it != r.settings.end() && AxisValue(it->second, number);
    });
    if (numbers) axis = key;
  }
  std::vector<Chart> out;
  if (axis.empty()) {
    Chart ttft{.title = "Time to first token",
               .x_label = "milliseconds",
               .y_label = "share of completed requests",
               .log_x = true,
               .y_max = 1};
    Chart gaps{.title = "Gaps between tokens",
               .x_label = "milliseconds",
               .y_label = "share of tokens",
               .log_x = true,
               .y_max = 1};
    Chart prefill{
        .title = "Load of the prefill workers", .x_label = "seconds", .y_label = "load / objective"};
    Chart decode{.title = "Load of the decode workers", .x_label = "seconds", .y_label = "load / objective"};
    for (const SimResult& r : results) {
      const std::string name = NameOf(r, "");
      ttft.series.push_back(Cdf(name, r.all.ttft));
      gaps.series.push_back(Cdf(name, r.gaps));
      prefill.series.push_back(Line(name, r.load, &LoadSample::prefill_load));
      decode.series.push_back(Line(name, r.load, &LoadSample::decode_load));
      ttft.x_mark = r.slo_ttft_seconds * 1e3;
      gaps.x_mark = r.slo_itl_seconds * 1e3;
    }
    ttft.x_note = gaps.x_note = "objective";
    return {ttft, gaps, prefill, decode};
  }
  const std::vector<std::tuple<const char*, const char*, double (*)(const SimResult&)>> figures = {
      {"Goodput", "good requests / s", [](const SimResult& r) { return r.goodput(); }},
      {"Mean time to first token", "seconds", [](const SimResult& r) { return Describe(r.all.ttft).mean; }},
      {"Rejected", "share of requests",
       [](const SimResult& r) {
         return static_cast<double>(r.all.rejected) /
                static_cast<double>(std::max<uint64_t>(1, r.all.requests));
       }},
      {"Prompt tokens from a cache", "share", [](const SimResult& r) { return r.hit_rate(); }}};
  for (const auto& [title, label, figure] : figures) {
    std::map<std::string, Series> lines;
    for (const SimResult& r : results) {
      const std::string name = NameOf(r, axis);
      Series& line = lines[name];
      line.name = name.empty() ? "all" : name;
      line.marks = true;
      if (AxisValue(r.settings.at(axis), number)) line.points.emplace_back(number, figure(r));
    }
    Chart chart{.title = title, .x_label = axis == "pd" ? "prefill workers" : axis, .y_label = label};
    for (auto& [name, line] : lines) {
      std::sort(line.points.begin(), line.points.end());
      chart.series.push_back(std::move(line));
    }
    out.push_back(std::move(chart));
  }
  return out;
}

}  // namespace tidepool
