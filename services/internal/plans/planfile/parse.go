package planfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"

	"github.com/tollkeeper/tollkeeper/schemas"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile/bulk"
)

const (
	// MaxFileBytes bounds a plans file.
	MaxFileBytes = 512 << 20
	// maxParsedBytes bounds one whose accounts are not written so that they can be
	// read one by one: the parser makes some sixty bytes of each.
	maxParsedBytes = 64 << 20
	// bulkBytes is from which size on that is worth while.
	bulkBytes = 1 << 20
)

// maxNesting of the file's values; the format needs six.
const maxNesting = 16

// maxProblems of one file that are told.
const maxProblems = 20

// Problem is one thing that is wrong with a plans file.
type Problem struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`   // from 1; 0 when the document is not from a file
	Column int    `json:"column,omitempty"` // from 1
	// Pointer is the JSON Pointer of the value (RFC 6901).
	Pointer string `json:"pointer"`
	// Reason says what is wrong, Do what to do next.
	Reason string `json:"reason"`
	Do     string `json:"do,omitempty"`
}

func (p Problem) String() string {
	var b strings.Builder
	switch {
	case p.Line > 0:
		fmt.Fprintf(&b, "%s:%d:%d: ", p.File, p.Line, p.Column)
	case p.File != "":
		b.WriteString(p.File + ": ")
	case p.Pointer != "":
		b.WriteString(p.Pointer + ": ")
	}
	b.WriteString(p.Reason)
	if p.Do != "" {
		b.WriteString(": " + p.Do)
	}
	return b.String()
}

// Error is a document that can't be used. Nothing was changed.
type Error struct {
	// Problems in the order of the file, at most 20.
	Problems []Problem
	// More is how many problems are not told.
	More int
}

func (e *Error) Error() string {
	lines := make([]string, 0, len(e.Problems)+1)
	for _, p := range e.Problems {
		lines = append(lines, p.String())
	}
	if e.More > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", e.More))
	}
	return strings.Join(lines, "\n")
}

// collector gathers problems up to the bound.
type collector struct {
	file string
	tree *tree // nil when there is no file
	// account is which one it is when the accounts that are looked at are one only.
	account int
	err     Error
}

// add notes a problem of the value at path, whose parts are strings and ints.
func (c *collector) add(path []any, reason, do string) {
	if len(c.err.Problems) >= maxProblems {
		c.err.More++
		return
	}
	if len(path) > 1 && path[0] == any("accounts") && c.account > 0 {
		path = slices.Clone(path)
		path[1] = c.account
	}
	p := Problem{File: c.file, Pointer: pointer(path), Reason: reason, Do: do}
	switch {
	case c.tree != nil:
		p.Line, p.Column = c.tree.position(path)
	case c.file != "":
		p.Line, p.Column = 1, 1
	}
	c.err.Problems = append(c.err.Problems, p)
}

// take takes over what another has found.
func (c *collector) take(from *collector) {
	c.err.Problems = append(c.err.Problems, from.err.Problems...)
	c.err.More += from.err.More
	if n := len(c.err.Problems); n > maxProblems {
		c.err.More += n - maxProblems
		c.err.Problems = c.err.Problems[:maxProblems]
	}
}

func (c *collector) result() error {
	if len(c.err.Problems) == 0 {
		return nil
	}
	return &c.err
}

func pointer(path []any) string {
	var b strings.Builder
	for _, p := range path {
		b.WriteByte('/')
		b.WriteString(strings.NewReplacer("~", "~0", "/", "~1").Replace(fmt.Sprint(p)))
	}
	return b.String()
}

// Parse reads a plans file (YAML or JSON). name stands in the errors, which are
// of type *Error. The returned document has passed the JSON Schema and Check.
func Parse(name string, data []byte) (*Document, error) {
	c := &collector{file: name}
	if len(data) > MaxFileBytes {
		c.add(nil, fmt.Sprintf("the file has %d bytes, at most %d are read", len(data), MaxFileBytes), "split the accounts among several ledgers")
		return nil, c.result()
	}
	if len(data) > bulkBytes {
		if f, ok := bulk.Split(data); ok {
			// The parser finds problems as well, and knows more ways to write things.
			if doc, err := parseBulk(name, data, f); err == nil || len(data) > maxParsedBytes {
				return doc, err
			}
		}
	}
	if len(data) > maxParsedBytes {
		c.add(nil, fmt.Sprintf("the file has %d bytes, at most %d are read of one that is written like this", len(data), maxParsedBytes),
			"write the accounts as a plain list below a line 'accounts:', or as JSON")
		return nil, c.result()
	}
	return parseAll(name, data)
}

// parseBulk reads the accounts one by one and the rest as a file of its own.
func parseBulk(name string, data []byte, f bulk.File) (*Document, error) {
	doc, err := parseAll(name, f.Rest)
	if err != nil {
		return nil, err
	}
	text := string(data)
	items := &items{text: text, file: f}
	c := &collector{file: name, tree: &tree{root: doc.tree.root, items: items}}
	doc.Accounts = make([]Account, len(f.Items))
	for i, it := range f.Items {
		a, ok := bulk.Read(text[it.Start:it.End], f.Flow)
		if !ok {
			c.irregular(i, &a)
		}
		doc.Accounts[i] = a
	}
	if err := c.result(); err != nil {
		return nil, err
	}
	doc.tree = c.tree
	if n := len(doc.Accounts); n > maxAccounts {
		c.add([]any{"accounts"}, fmt.Sprintf("accounts has %d entries", n), fmt.Sprintf("use at most %d", maxAccounts))
		return nil, c.result()
	}
	check(doc, c)
	if err := c.result(); err != nil {
		return nil, err
	}
	return doc, nil
}

// maxAccounts is the schema's bound.
const maxAccounts = 2_000_000

// irregular leaves an account to the parser and the schema.
func (c *collector) irregular(i int, a *Account) {
	body, _, err := c.tree.items.parse(i)
	if err != nil {
		var problems *Error
		if !errors.As(err, &problems) {
			problems = &Error{Problems: []Problem{{Line: c.tree.items.file.Items[i].Line, Column: 1, Reason: err.Error()}}}
		}
		for k := range problems.Problems {
			problems.Problems[k].File = c.file
		}
		c.take(&collector{err: *problems})
		return
	}
	one := &collector{file: c.file, tree: c.tree, account: i}
	value := one.convert(body, nil)
	schema, err := compiledSchema()
	if err == nil && len(one.err.Problems) == 0 {
		var invalid *jsonschema.ValidationError
		if err := schema.Validate(value); errors.As(err, &invalid) {
			one.schemaProblems(invalid)
		}
		var doc *Document
		if doc, err = decode(value); err == nil && len(doc.Accounts) == 1 {
			*a = doc.Accounts[0]
		}
	}
	c.take(one)
	if err != nil && len(one.err.Problems) == 0 {
		c.add([]any{"accounts", i}, "this account can't be read", "write it as the documentation shows")
	}
}

// items are the accounts of a file that were not parsed.
type items struct {
	text string
	file bulk.File
}

// parse parses one account as a file with nothing else. lines must be added to its
// lines to get those of the file.
func (s *items) parse(i int) (body ast.Node, lines int, err error) {
	it := s.file.Items[i]
	var b strings.Builder
	b.WriteString("version: 1\naccounts:")
	if s.file.Flow {
		b.WriteString(" [\n" + strings.Repeat(" ", it.Column-1) + s.text[it.Start:it.End] + "]\n")
	} else {
		b.WriteString("\n" + s.text[it.Start:it.End])
	}
	lines = it.Line - 3
	file, err := parser.ParseBytes([]byte(b.String()), 0)
	if err != nil {
		var problems *Error
		if err := syntaxError("", err); errors.As(err, &problems) {
			for k := range problems.Problems {
				problems.Problems[k].Line += lines
			}
			return nil, lines, problems
		}
		return nil, lines, err
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return nil, lines, errors.New("it is more than an account")
	}
	return file.Docs[0].Body, lines, nil
}

// parseAll reads a file with the parser.
func parseAll(name string, data []byte) (*Document, error) {
	c := &collector{file: name}
	if at := tooDeep(data); at > 0 {
		c.err.Problems = []Problem{{File: name, Line: at, Column: 1, Reason: "brackets are nested too deeply", Do: "the format needs six levels"}}
		return nil, c.result()
	}
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, syntaxError(name, err)
	}
	var body ast.Node
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if body != nil {
			line, col := nodePosition(doc.Body)
			return nil, &Error{Problems: []Problem{{File: name, Line: line, Column: col, Reason: "a second YAML document begins here", Do: "keep everything in one, without '---'"}}}
		}
		body = doc.Body
	}
	if body == nil {
		c.add(nil, "the file is empty", "begin with 'version: 1'")
		return nil, c.result()
	}
	c.tree = &tree{root: body}
	value := c.convert(body, nil)
	if err := c.result(); err != nil {
		return nil, err
	}
	schema, err := compiledSchema()
	if err != nil {
		return nil, err
	}
	if err := schema.Validate(value); err != nil {
		var invalid *jsonschema.ValidationError
		if !errors.As(err, &invalid) {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		c.schemaProblems(invalid)
		return nil, c.result()
	}
	doc, err := decode(value)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	doc.file, doc.tree = name, c.tree
	check(doc, c)
	if err := c.result(); err != nil {
		return nil, err
	}
	return doc, nil
}

// tooDeep returns the line on which brackets are nested more deeply than any
// file of ours, 0 when none is: the YAML parser recurses, and its work grows
// with the square of the depth. Brackets in strings count too, which only
// makes it stricter by what nobody writes.
func tooDeep(data []byte) int {
	const most = 256
	line, depth := 1, 0
	for _, b := range data {
		switch b {
		case '\n':
			line++
		case '[', '{':
			if depth++; depth > most {
				return line
			}
		case ']', '}':
			depth = max(depth-1, 0)
		}
	}
	return 0
}

func syntaxError(name string, err error) error {
	var syntax *yaml.SyntaxError
	if !errors.As(err, &syntax) || syntax.Token == nil || syntax.Token.Position == nil {
		return &Error{Problems: []Problem{{File: name, Reason: "it is not YAML: " + firstLine(err.Error()), Do: "see the example in the documentation"}}}
	}
	return &Error{Problems: []Problem{{
		File: name, Line: syntax.Token.Position.Line, Column: syntax.Token.Position.Column,
		Reason: "it is not YAML: " + firstLine(syntax.Message), Do: "correct the indentation, brackets or quotes there",
	}}}
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

func compileSchema() (*jsonschema.Schema, error) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schemas.Plans))
	if err != nil {
		return nil, fmt.Errorf("plans.schema.json: %w", err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("plans.schema.json", doc); err != nil {
		return nil, fmt.Errorf("plans.schema.json: %w", err)
	}
	s, err := c.Compile("plans.schema.json")
	if err != nil {
		return nil, fmt.Errorf("plans.schema.json: %w", err)
	}
	return s, nil
}

// compiledSchema is compiled once: it is a constant of the program.
var compiledSchema = sync.OnceValues(compileSchema)

// schemaProblems turns the schema's findings into sentences.
func (c *collector) schemaProblems(e *jsonschema.ValidationError) {
	if len(e.Causes) > 0 {
		for _, cause := range e.Causes {
			c.schemaProblems(cause)
		}
		return
	}
	path := make([]any, len(e.InstanceLocation))
	for i, p := range e.InstanceLocation {
		path[i] = p
	}
	field := "the file"
	if n := len(path); n > 0 {
		field = fmt.Sprintf("%v", path[n-1])
		if _, err := strconv.Atoi(field); err == nil {
			field = "this entry"
		}
	}
	switch k := e.ErrorKind.(type) {
	case *kind.AdditionalProperties:
		for _, p := range k.Properties {
			c.add(append(path[:len(path):len(path)], p), fmt.Sprintf("%q is not a field of %s", p, place(path)), "known are "+strings.Join(fields(path), ", "))
		}
	case *kind.Required:
		c.add(path, fmt.Sprintf("%s has no %s", place(path), strings.Join(k.Missing, ", ")), "add it")
	case *kind.Type:
		do := "write " + aKind(k.Want)
		if len(k.Want) == 1 && k.Want[0] == "string" && (k.Got == "number" || k.Got == "integer" || k.Got == "boolean") {
			do = "put it in quotes"
		}
		c.add(path, fmt.Sprintf("%s is %s, not %s", field, aKind([]string{k.Got}), aKind(k.Want)), do)
	case *kind.Const:
		c.add(path, fmt.Sprintf("%s is %v", field, k.Got), fmt.Sprintf("this program knows %v only", k.Want))
	case *kind.Enum:
		want := make([]string, len(k.Want))
		for i, w := range k.Want {
			want[i] = fmt.Sprint(w)
		}
		c.add(path, fmt.Sprintf("%s %q is not known", field, fmt.Sprint(k.Got)), "use one of "+strings.Join(want, ", "))
	case *kind.Minimum:
		c.add(path, fmt.Sprintf("%s is below %s", field, k.Want.RatString()), "write a number from "+k.Want.RatString()+" on")
	case *kind.Maximum:
		c.add(path, fmt.Sprintf("%s is above %s", field, k.Want.RatString()), "write a number up to "+k.Want.RatString())
	case *kind.MinLength:
		c.add(path, field+" is empty", "write its name, or leave the field out")
	case *kind.MaxLength:
		c.add(path, fmt.Sprintf("%s is %d characters long", field, k.Got), fmt.Sprintf("use at most %d", k.Want))
	case *kind.MaxItems:
		c.add(path, fmt.Sprintf("%s has %d entries", field, k.Got), fmt.Sprintf("use at most %d", k.Want))
	case *kind.Pattern:
		// The value is not repeated: it might be a key that was put where
		// its hash belongs.
		if field == "sha256" {
			c.add(path, "sha256 is not 64 lower-case hex digits", "write the SHA-256 of the key, never the key itself")
			return
		}
		if n := len(path); n > 1 && path[n-2] == any("lease") {
			c.add(path, field+" is not a span of time", "write it like 5s, 400ms or 1m30s")
			return
		}
		c.add(path, fmt.Sprintf("%s has characters or a length that a name must not have", field), "use letters, digits, '_', '.', '-'")
	default:
		c.add(path, fmt.Sprintf("%s does not match the schema (%s)", field, strings.Join(e.ErrorKind.KeywordPath(), "/")), "see plans.schema.json")
	}
}

func aKind(kinds []string) string {
	names := map[string]string{
		"object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "nothing",
	}
	out := make([]string, len(kinds))
	for i, k := range kinds {
		if out[i] = names[k]; out[i] == "" {
			out[i] = k
		}
	}
	return strings.Join(out, " or ")
}

// place names the kind of mapping at path.
func place(path []any) string {
	switch n := len(path); {
	case n == 0:
		return "the file"
	case fmt.Sprint(path[n-1]) == "filter":
		return "a filter"
	case fmt.Sprint(path[n-1]) == "lease":
		return "a lease"
	case n == 2 && path[0] == "plans":
		return "a plan"
	case n == 2 && path[0] == "accounts":
		return "an account"
	case n == 4 && path[2] == "limits":
		return "a limit"
	case n == 4 && path[2] == "keys":
		return "a key"
	}
	return pointer(path)
}

// fields lists what a mapping may have; the schema is the truth, and a test
// compares.
func fields(path []any) []string {
	return map[string][]string{
		"the file":   {"version", "plans", "accounts"},
		"a plan":     {"id", "limits"},
		"a limit":    {"id", "meter", "window", "amount", "tier", "warn_percent", "code", "action_url", "filter", "lease"},
		"a lease":    {"term", "patience", "release_after", "max_exposure"},
		"a filter":   {"models", "routes", "methods"},
		"an account": {"id", "parent", "plan", "keys"},
		"a key":      {"id", "sha256"},
	}[place(path)]
}

func decode(value any) (*Document, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	var doc Document
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	return &doc, nil
}

// convert turns YAML into JSON values, and refuses what JSON does not have.
func (c *collector) convert(n ast.Node, path []any) any {
	if len(path) > maxNesting {
		c.add(path[:maxNesting], "values are nested too deeply here", "the format needs six levels")
		return nil
	}
	switch n := n.(type) {
	case *ast.MappingNode:
		return c.mapping(n.Values, path)
	case *ast.MappingValueNode:
		return c.mapping([]*ast.MappingValueNode{n}, path)
	case *ast.SequenceNode:
		out := make([]any, len(n.Values))
		for i, v := range n.Values {
			out[i] = c.convert(v, append(path, i))
		}
		return out
	case *ast.StringNode:
		return n.Value
	case *ast.LiteralNode:
		return n.Value.Value
	case *ast.IntegerNode:
		switch v := n.Value.(type) {
		case int64:
			return json.Number(strconv.FormatInt(v, 10))
		case uint64:
			return json.Number(strconv.FormatUint(v, 10))
		}
	case *ast.FloatNode:
		return n.Value
	case *ast.BoolNode:
		return n.Value
	case *ast.NullNode:
		return nil
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		c.add(path, "anchors, aliases and merge keys are not part of the format", "write the value out")
		return nil
	case *ast.TagNode:
		c.add(path, "tags are not part of the format", "leave it out")
		return nil
	}
	c.add(path, "this kind of YAML value is not part of the format", "write a mapping, a list, text, a whole number, true or false")
	return nil
}

func (c *collector) mapping(values []*ast.MappingValueNode, path []any) any {
	out := make(map[string]any, len(values))
	for _, v := range values {
		key, ok := keyName(v)
		if !ok {
			// A merge key, or a mapping as a key.
			line, col := nodePosition(v)
			if len(c.err.Problems) < maxProblems {
				c.err.Problems = append(c.err.Problems, Problem{File: c.file, Line: line, Column: col, Pointer: pointer(path), Reason: "a field's name must be plain text", Do: "write fields out; merge keys are not part of the format"})
			}
			continue
		}
		if _, twice := out[key]; twice {
			line, col := nodePosition(v.Key)
			if len(c.err.Problems) < maxProblems {
				c.err.Problems = append(c.err.Problems, Problem{File: c.file, Line: line, Column: col, Pointer: pointer(append(path, key)), Reason: fmt.Sprintf("%q is given twice", key), Do: "remove one"})
			}
			continue
		}
		out[key] = c.convert(v.Value, append(path, key))
	}
	return out
}

func keyName(v *ast.MappingValueNode) (string, bool) {
	s, ok := v.Key.(ast.Node).(*ast.StringNode)
	if !ok {
		return "", false
	}
	return s.Value, true
}

// tree finds positions in a parsed file.
type tree struct {
	root ast.Node
	// items are the accounts, when they are not in root.
	items *items
}

// position returns line and column of the value at path; for a path that ends in
// the file before it does, those of the last part that is there.
func (t *tree) position(path []any) (line, column int) {
	if t.items != nil && len(path) > 1 && path[0] == any("accounts") {
		i, err := strconv.Atoi(fmt.Sprint(path[1]))
		if err != nil || i < 0 || i >= len(t.items.file.Items) {
			return 1, 1
		}
		body, lines, err := t.items.parse(i)
		if err != nil {
			return t.items.file.Items[i].Line, 1
		}
		path = slices.Clone(path)
		path[1] = 0
		line, column = (&tree{root: body}).position(path)
		return line + lines, column
	}
	n := t.root
	line, column = nodePosition(n)
	for _, part := range path {
		var next ast.Node
		switch n := n.(type) {
		case *ast.MappingNode:
			for _, v := range n.Values {
				if k, ok := keyName(v); ok && k == fmt.Sprint(part) {
					next = v.Value
					line, column = nodePosition(v.Key)
				}
			}
		case *ast.MappingValueNode:
			if k, ok := keyName(n); ok && k == fmt.Sprint(part) {
				next = n.Value
				line, column = nodePosition(n.Key)
			}
		case *ast.SequenceNode:
			i, err := strconv.Atoi(fmt.Sprint(part))
			if err == nil && i >= 0 && i < len(n.Values) {
				next = n.Values[i]
				line, column = nodePosition(next)
			}
		}
		if next == nil {
			return line, column
		}
		n = next
	}
	switch n.(type) {
	case *ast.MappingNode, *ast.SequenceNode, *ast.NullNode:
		// A list or mapping is found better by its field's name.
		return line, column
	}
	return nodePosition(n)
}

func nodePosition(n ast.Node) (line, column int) {
	var tk *token.Token
	switch n := n.(type) {
	case *ast.MappingNode:
		if len(n.Values) > 0 {
			return nodePosition(n.Values[0].Key)
		}
		tk = n.Start
	case *ast.MappingValueNode:
		return nodePosition(n.Key)
	default:
		tk = n.GetToken()
	}
	if tk == nil || tk.Position == nil {
		return 1, 1
	}
	return tk.Position.Line, tk.Position.Column
}
