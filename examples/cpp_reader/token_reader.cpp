// Prints one line of JSON per token message, with sums that can be compared with another reader's.
//
// As a node, where ROS 2 is installed (CMakeLists.txt beside this file):
//     ros2 run token_reader token_reader --ros-args -r tokens:=/tokens
// As a program that reads the data of one message from a file:
//     g++ -std=c++17 -O2 token_reader.cpp -o token_reader && ./token_reader ../sample_message.safetensors
//
// The reader itself is token_reader.hpp, for use in other programs.

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "token_reader.hpp"

#ifdef WITH_ROS
#include <rclcpp/rclcpp.hpp>
#include <sensor_msgs/msg/compressed_image.hpp>
#endif

// A JSON string.
std::string quote(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    char escaped[8];
    if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      quoted += escaped;
    } else {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c;
    }
  }
  return quoted + "\"";
}

std::string describe(const vla_tokens::VisualTokens& tokens) {
  std::string line = "{\"shape\": [" + std::to_string(tokens.views) + ", " + std::to_string(tokens.tokens) + ", " +
                     std::to_string(tokens.channels) + "], \"dtype\": " + quote(tokens.stored) +
                     ", \"sequence\": " + std::to_string(tokens.sequence()) +
                     ", \"fingerprint\": " + quote(tokens.fingerprint()) + ", \"views\": [";
  for (size_t view = 0; view < tokens.views; ++view) {
    double sum = 0, weighted = 0;
    for (size_t i = 0; i < tokens.tokens * tokens.channels; ++i) {
      const double value = tokens.token(view, 0)[i];
      sum += value;
      weighted += value * double(i % 1009);
    }
    char numbers[160];
    std::snprintf(numbers, sizeof numbers, "\"sec\": %llu, \"valid\": %s, \"sum\": %.17g, \"weighted\": %.17g",
                  static_cast<unsigned long long>(tokens.view(view).at("stamp").at("sec").as_size()),
                  tokens.valid(view) ? "true" : "false", sum, weighted);
    line += (view ? ", {\"camera\": " : "{\"camera\": ") + quote(tokens.camera(view)) + ", " + numbers + "}";
  }
  return line + "]}";
}

#ifdef WITH_ROS

class TokenReader : public rclcpp::Node {
 public:
  TokenReader() : Node("token_reader") {
    subscription_ = create_subscription<sensor_msgs::msg::CompressedImage>(
        "tokens", rclcpp::QoS(10).reliable(), [this](sensor_msgs::msg::CompressedImage::ConstSharedPtr message) {
          if (message->format != vla_tokens::FORMAT) {
            RCLCPP_ERROR(get_logger(), "rejected: format '%s' is not vla_tokens/1", message->format.c_str());
            return;
          }
          try {
            std::puts(describe(vla_tokens::read_tokens(message->data.data(), message->data.size())).c_str());
            std::fflush(stdout);
          } catch (const std::exception& error) {
            RCLCPP_ERROR(get_logger(), "rejected: %s", error.what());
          }
        });
  }

 private:
  rclcpp::Subscription<sensor_msgs::msg::CompressedImage>::SharedPtr subscription_;
};

int main(int argc, char** argv) {
  rclcpp::init(argc, argv);
  rclcpp::spin(std::make_shared<TokenReader>());
  rclcpp::shutdown();
}

#else

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: token_reader FILE (the data of one token message)\n");
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "token_reader: cannot open %s\n", argv[1]);
    return 1;
  }
  const std::vector<uint8_t> data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  try {
    std::puts(describe(vla_tokens::read_tokens(data.data(), data.size())).c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "token_reader: %s\n", error.what());
    return 1;
  }
}

#endif
