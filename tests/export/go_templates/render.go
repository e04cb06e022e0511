// Renders Go templates for conversations as Ollama does: reads cases from stdin, writes the texts to stdout, both JSON.
//
//	python -m tests.export.go_templates cases | go run render.go | python -m tests.export.go_templates keep
//
// A template is given .System (all system messages, joined by an empty line) and .Messages, in which neighbours of one
// role are one message.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type conversation struct {
	Template string
	Messages []*message
}

func main() {
	var cases []conversation
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := make([]string, len(cases))
	for i, c := range cases {
		texts[i] = render(c)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}

func render(c conversation) string {
	var system []string
	var joined []*message
	for _, m := range c.Messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role {
			joined[last].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, m)
		}
	}
	var text strings.Builder
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
	values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined, "Response": ""}
	if err := parsed.Execute(&text, values); err != nil {
		panic(err)
	}
	return text.String()
}
