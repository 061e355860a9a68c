{{/* Objects that several roles have. scope: root, role. */}}

{{/* Who decides the number of pods: fixed here, or somebody else, and then it must not be written. */}}
{{- define "lagwise.fixedReplicas" -}}
{{- eq .Values.autoscaling.mode "none" | ternary "true" "" -}}
{{- end -}}

{{/* Whether a role is meant to have no pod at all: routes that score without oracles. */}}
{{- define "lagwise.isNone" -}}
{{- $replicas := (index .root.Values .role).replicas -}}
{{- if and (include "lagwise.fixedReplicas" .root) (not (kindIs "invalid" $replicas)) (eq (int $replicas) 0) -}}true{{- end -}}
{{- end -}}

{{- define "lagwise.deployment" -}}
{{- $values := index .root.Values .role -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
  annotations:
    lagwise.dev/scaling: {{ .root.Values.autoscaling.mode }}
spec:
  {{- if include "lagwise.fixedReplicas" .root }}
  replicas: {{ if kindIs "invalid" $values.replicas }}1{{ else }}{{ int $values.replicas }}{{ end }}
  {{- end }}
  revisionHistoryLimit: 5
  progressDeadlineSeconds: {{ add (int $values.startupSeconds) 600 }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      {{- if gt (int $values.gpu.count) 0 }}
      # A surge pod would wait for GPUs that only its predecessor can free.
      maxSurge: 0
      maxUnavailable: 1
      {{- else }}
      maxSurge: 25%
      maxUnavailable: 0
      {{- end }}
  selector:
    matchLabels:
      {{- include "lagwise.selectorLabels" . | nindent 6 }}
  template:
    {{- include "lagwise.podTemplate" . | nindent 4 }}
{{- end -}}

{{- define "lagwise.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
  {{- with ((index .root.Values .role).serviceAccount | default dict).annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}

{{/* maxUnavailable, never minAvailable: a drain always goes on, at any number of pods. Pods that
     are not ready do not stand in its way either. */}}
{{- define "lagwise.budget" -}}
{{- $budget := (index .root.Values .role).podDisruptionBudget -}}
{{- if $budget.enabled -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ $budget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "lagwise.selectorLabels" . | nindent 6 }}
{{- end -}}
{{- end -}}

{{- define "lagwise.networkPolicy" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if $policy.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "lagwise.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- $serves := not (has .role (list "operator" "check")) }}
  {{- if $serves }}
  ingress:
    {{- with $policy.metricsFrom }}
    - from:
        {{- toYaml . | nindent 8 }}
      ports:
        - port: 9090
          protocol: TCP
    {{- end }}
    {{- if and (eq .role "learner") (gt (int .root.Values.learner.nodes) 1) }}
    - from:
        - podSelector:
            matchLabels:
              {{- include "lagwise.selectorLabels" . | nindent 14 }}
    {{- end }}
  {{- end }}
  egress:
    {{- include "lagwise.egressDns" . | nindent 4 }}
    {{- if .root.Values.nats.enabled }}
    - to:
        - podSelector:
            matchLabels:
              {{- include "lagwise.selectorLabels" (dict "root" .root "role" "nats") | nindent 14 }}
      ports:
        - port: 4222
          protocol: TCP
    {{- else }}
    # An external NATS has no labels we know: its port, anywhere.
    - ports:
        - port: {{ include "lagwise.externalNatsPort" .root }}
          protocol: TCP
    {{- end }}
    {{- if and $serves (hasPrefix "hf://" (include "lagwise.modelSource" .root)) (not .root.Values.huggingface.offline) }}
    # The model hub, for the init container.
    - ports:
        - port: 443
          protocol: TCP
    {{- end }}
    {{- if and (eq .role "learner") (gt (int .root.Values.learner.nodes) 1) }}
    - to:
        - podSelector:
            matchLabels:
              {{- include "lagwise.selectorLabels" . | nindent 14 }}
    {{- end }}
    {{- if eq .role "operator" }}
    # The API server.
    - ports:
        - port: 443
          protocol: TCP
        - port: 6443
          protocol: TCP
    {{- end }}
    {{- with index $policy.extraEgress .role }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "lagwise.egressDns" -}}
# Anywhere: a node-local resolver is no pod.
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{- define "lagwise.externalNatsPort" -}}
{{- $host := (urlParse .Values.nats.external.url).host -}}
{{- regexFind ":[0-9]+$" $host | trimPrefix ":" | default "4222" -}}
{{- end -}}

{{/* The wanted number of pods as an external metric. AverageValue 1: the metric *is* the number. */}}
{{- define "lagwise.hpa" -}}
{{- if eq .root.Values.autoscaling.mode "hpa" -}}
{{- $range := include "lagwise.scalingRange" . | fromJson -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "lagwise.objectName" . }}
  minReplicas: {{ int $range.min }}
  maxReplicas: {{ int $range.max }}
  metrics:
    - type: External
      external:
        metric:
          name: lagwise_{{ .role }}_wanted
          selector:
            matchLabels:
              release: {{ .root.Release.Name }}
        target:
          type: AverageValue
          averageValue: "1"
  behavior:
    {{- include "lagwise.scalingBehavior" .root | nindent 4 }}
{{- end -}}
{{- end -}}

{{- define "lagwise.scalingRange" -}}
{{- $range := index .root.Values.autoscaling .role -}}
{{- if gt (int $range.min) (int $range.max) -}}
{{- fail (printf "autoscaling.%s.min %d: exceeds its max %d" .role (int $range.min) (int $range.max)) -}}
{{- end -}}
{{- toJson $range -}}
{{- end -}}

{{- define "lagwise.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - type: Percent
      value: 100
      periodSeconds: 60
    - type: Pods
      value: 2
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: {{ int .Values.autoscaling.scaleDownStabilizationSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end -}}

{{- define "lagwise.scaledObject" -}}
{{- if eq .root.Values.autoscaling.mode "keda" -}}
{{- $range := include "lagwise.scalingRange" . | fromJson -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  {{- include "lagwise.metadata" . | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "lagwise.objectName" . }}
  pollingInterval: 15
  minReplicaCount: {{ int $range.min }}
  maxReplicaCount: {{ int $range.max }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "lagwise.scalingBehavior" .root | nindent 8 }}
  triggers:
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ .root.Values.autoscaling.prometheusAddress }}
        query: lagwise_{{ .role }}_wanted{release="{{ .root.Release.Name }}",namespace="{{ .root.Release.Namespace }}"}
        threshold: "1"
        # No answer is no reason to scale: the number of pods stays.
        ignoreNullValues: "false"
{{- end -}}
{{- end -}}
