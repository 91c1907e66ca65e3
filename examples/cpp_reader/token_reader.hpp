// Reads visual tokens (docs/wire_format.md, vla_tokens/1) in C++17, without any library but the standard one.
//
//     vla_tokens::VisualTokens tokens = vla_tokens::read_tokens(message->data.data(), message->data.size());
//     const float* first = tokens.token(0, 0);  // tokens.channels values
//
// Check the message's `format` against vla_tokens::FORMAT before. To try a reader: ../sample_message.safetensors is the
// data of one message, ../sample_message.json says what is in it.

#ifndef VLA_TOKENS_TOKEN_READER_HPP_
#define VLA_TOKENS_TOKEN_READER_HPP_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vla_tokens {

// The `format` of every token message.
constexpr const char* FORMAT = "safetensors; vla_tokens/1";

namespace json {

// Just enough JSON: a value is one of the six kinds, and what is amiss throws std::runtime_error.
struct Value {
  enum Kind { null, boolean, number, string, array, object } kind = null;
  bool truth = false;
  double real = 0;
  std::string text;  // of a string; of a number, as it was written
  std::vector<Value> items;
  std::map<std::string, Value> members;

  const Value& at(const std::string& key) const {
    auto found = members.find(key);
    if (kind != object || found == members.end()) throw std::runtime_error("no entry \"" + key + "\"");
    return found->second;
  }
  const Value& at(size_t index) const {
    if (kind != array || index >= items.size()) throw std::runtime_error("an array is too short");
    return items[index];
  }
  bool has(const std::string& key) const { return kind == object && members.count(key) > 0; }
  const std::string& as_string() const {
    if (kind != string) throw std::runtime_error("a string is needed");
    return text;
  }
  // A non-negative integer; doubles hold them exactly only up to 2^53.
  uint64_t as_size() const {
    if (kind != number || text.find_first_not_of("0123456789") != std::string::npos)
      throw std::runtime_error("a non-negative integer is needed, not " + text);
    return std::stoull(text);
  }
};

class Parser {
 public:
  Parser(const char* begin, const char* end) : at_(begin), end_(end) {}

  Value parse() {
    Value value = parse_value(0);
    skip_space();
    if (at_ != end_) fail("something follows the JSON");
    return value;
  }

 private:
  const char* at_;
  const char* end_;

  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error("bad JSON: " + what); }
  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  char peek() {
    if (at_ == end_) fail("it ends too early");
    return *at_;
  }
  void expect(const char* word) {
    for (; *word; ++word, ++at_)
      if (peek() != *word) fail(std::string("expected ") + word);
  }

  Value parse_value(int depth) {
    if (depth > 64) fail("nested too deeply");
    skip_space();
    Value value;
    switch (peek()) {
      case '{': {
        value.kind = Value::object;
        ++at_;
        skip_space();
        if (peek() == '}') { ++at_; break; }
        while (true) {
          skip_space();
          std::string key = parse_string();
          skip_space();
          expect(":");
          if (!value.members.emplace(key, parse_value(depth + 1)).second) fail("a key twice: " + key);
          skip_space();
          if (peek() == '}') { ++at_; break; }
          expect(",");
        }
        break;
      }
      case '[': {
        value.kind = Value::array;
        ++at_;
        skip_space();
        if (peek() == ']') { ++at_; break; }
        while (true) {
          value.items.push_back(parse_value(depth + 1));
          skip_space();
          if (peek() == ']') { ++at_; break; }
          expect(",");
        }
        break;
      }
      case '"': value.kind = Value::string; value.text = parse_string(); break;
      case 't': expect("true"); value.kind = Value::boolean; value.truth = true; break;
      case 'f': expect("false"); value.kind = Value::boolean; break;
      case 'n': expect("null"); break;
      default: {
        value.kind = Value::number;
        while (at_ != end_ && std::strchr("+-.0123456789eE", *at_) && *at_) value.text += *at_++;
        if (value.text.empty()) fail("a value is needed");
        try { value.real = std::stod(value.text); } catch (const std::exception&) { fail("a number: " + value.text); }
      }
    }
    return value;
  }

  unsigned parse_hex() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      char c = peek();
      code = code * 16 + (c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : (fail("\\u"), 0));
    }
    return code;
  }

  std::string parse_string() {
    expect("\"");
    std::string text;
    while (peek() != '"') {
      char c = *at_++;
      if (c != '\\') { text += c; continue; }
      switch (peek()) {
        case 'n': text += '\n'; ++at_; break;
        case 't': text += '\t'; ++at_; break;
        case 'r': text += '\r'; ++at_; break;
        case 'b': text += '\b'; ++at_; break;
        case 'f': text += '\f'; ++at_; break;
        case 'u': {
          ++at_;
          unsigned code = parse_hex();
          if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
            expect("\\u");
            code = 0x10000 + ((code - 0xD800) << 10) + (parse_hex() - 0xDC00);
          }
          if (code < 0x80) text += char(code);
          else if (code < 0x800) { text += char(0xC0 | code >> 6); text += char(0x80 | (code & 0x3F)); }
          else if (code < 0x10000) {
            text += char(0xE0 | code >> 12); text += char(0x80 | (code >> 6 & 0x3F)); text += char(0x80 | (code & 0x3F));
          } else {
            text += char(0xF0 | code >> 18); text += char(0x80 | (code >> 12 & 0x3F));
            text += char(0x80 | (code >> 6 & 0x3F)); text += char(0x80 | (code & 0x3F));
          }
          break;
        }
        default: text += *at_++;  // \" \\ \/
      }
    }
    ++at_;
    return text;
  }
};

}  // namespace json

// The tokens of one message, widened to float.
struct VisualTokens {
  size_t views = 0, tokens = 0, channels = 0;
  std::vector<float> values;  // [views, tokens, channels], row-major
  std::string stored;         // the type in the message: BF16, F16 or F32
  json::Value metadata;       // docs/wire_format.md, "The metadata"

  // The channels of one token; views and tokens are counted from 0.
  const float* token(size_t view, size_t index) const { return &values[(view * tokens + index) * channels]; }

  // What a policy looks at most; all else is in `metadata`. They throw std::runtime_error where an entry is amiss.
  uint64_t sequence() const { return metadata.at("sequence").as_size(); }
  const std::string& fingerprint() const { return metadata.at("fingerprint").as_string(); }
  const json::Value& view(size_t index) const { return metadata.at("views").at(index); }
  const std::string& camera(size_t index) const { return view(index).at("camera").as_string(); }
  bool valid(size_t index) const { return view(index).at("valid").truth; }  // false: ignore this view's tokens
};

inline float widen_bfloat16(uint16_t word) {
  uint32_t bits = uint32_t(word) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen_float16(uint16_t word) {
  int exponent = word >> 10 & 0x1F, mantissa = word & 0x3FF;
  float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
               : exponent == 0 ? std::ldexp(float(mantissa), -24)
                               : std::ldexp(float(mantissa + 1024), exponent - 25);
  return word & 0x8000 ? -size : size;
}

// Reads the `data` of one message. Throws a std::exception if it is not a valid vla_tokens/1 message; trusts nothing in
// it. `features` are not read.
inline VisualTokens read_tokens(const uint8_t* data, size_t size) {
  if (size < 8) throw std::runtime_error("too few bytes for a header");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | data[i];
  if (length > size - 8) throw std::runtime_error("the header is longer than the data");
  if (length > 1 << 20) throw std::runtime_error("the header is longer than 1 MiB");
  const char* text = reinterpret_cast<const char*>(data) + 8;
  json::Value header = json::Parser(text, text + length).parse();
  const uint8_t* payload = data + 8 + length;
  const size_t payload_size = size - 8 - length;

  VisualTokens result;
  const std::string& metadata = header.at("__metadata__").at("vla_tokens").as_string();
  result.metadata = json::Parser(metadata.data(), metadata.data() + metadata.size()).parse();
  if (result.metadata.at("schema").as_string() != "vla_tokens/1")
    throw std::runtime_error("schema " + result.metadata.at("schema").as_string() + " is not vla_tokens/1");

  // Every byte of the payload belongs to one tensor: the features cannot pass for the tokens.
  std::map<uint64_t, uint64_t> spans;  // start → stop; std::map sorts them
  for (const auto& [name, described] : header.members) {
    if (name == "__metadata__") continue;
    const json::Value& offsets = described.at("data_offsets");
    const uint64_t from = offsets.at(size_t(0)).as_size(), to = offsets.at(1).as_size();
    if (to > from && !spans.emplace(from, to).second) throw std::runtime_error("tensors overlap");
  }
  uint64_t filled = 0;
  for (const auto& [from, to] : spans) {
    if (from != filled) throw std::runtime_error("tensors overlap or leave a gap");
    filled = to;
  }
  if (filled != payload_size) throw std::runtime_error("the tensors do not fill the payload");

  const json::Value& entry = header.at("tokens");
  result.stored = entry.at("dtype").as_string();
  const size_t width = result.stored == "F32" ? 4 : result.stored == "BF16" || result.stored == "F16" ? 2 : 0;
  if (!width) throw std::runtime_error("tokens are stored as " + result.stored);
  const json::Value& shape = entry.at("shape");
  if (shape.items.size() != 3) throw std::runtime_error("tokens are not [views, tokens, channels]");
  uint64_t count = 1;
  for (const json::Value& extent : shape.items) {
    const uint64_t value = extent.as_size();
    if (!value || value > payload_size / count) throw std::runtime_error("the shape does not fit the data");
    count *= value;
  }
  const uint64_t start = entry.at("data_offsets").at(0).as_size(), stop = entry.at("data_offsets").at(1).as_size();
  if (start > stop || stop > payload_size || stop - start != count * width)
    throw std::runtime_error("the offsets do not fit the data");
  result.views = shape.at(size_t(0)).as_size();
  result.tokens = shape.at(1).as_size();
  result.channels = shape.at(2).as_size();
  if (result.metadata.at("views").items.size() != result.views) throw std::runtime_error("views are described wrongly");

  result.values.resize(count);
  const uint8_t* from = payload + start;
  for (uint64_t i = 0; i < count; ++i, from += width) {
    const uint16_t word = uint16_t(from[0] | from[1] << 8);
    if (width == 4) {
      const uint32_t bits = word | uint32_t(from[2]) << 16 | uint32_t(from[3]) << 24;
      std::memcpy(&result.values[i], &bits, 4);
    } else {
      result.values[i] = result.stored == "BF16" ? widen_bfloat16(word) : widen_float16(word);
    }
  }
  return result;
}

}  // namespace vla_tokens

#endif  // VLA_TOKENS_TOKEN_READER_HPP_
